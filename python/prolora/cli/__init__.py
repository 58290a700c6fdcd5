"""The command line: arguments in, library calls, tables or JSON out."""

import gc
import os
import signal


def stop(*_: object) -> None:
    """Ends the process at once: nothing was begun that would have to be tidied up."""
    os.write(2, b"Stopped; nothing was written.\n")
    os._exit(130)


def main() -> None:
    """Runs the command line, which takes seconds to load."""
    # Raised while a library is loaded, an exception can be printed by it, or be lost.
    signal.signal(signal.SIGINT, stop)
    gc.disable()  # until all is loaded, there is no garbage
    from .running import run

    run()
