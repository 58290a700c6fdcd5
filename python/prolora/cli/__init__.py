"""The command line: arguments in, library calls, tables or JSON out."""

import sys


def main() -> None:
    """Runs the command line, which takes seconds to load."""
    try:
        from .running import run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("Stopped; nothing was written.\n")
        sys.exit(130)
