"""The command line: arguments in, library calls, tables or JSON out. No logic of its own.

`prolora --help` shows what the exit codes mean; `exits.py` defines them and
decides which one it is.
"""

from .running import main

__all__ = ["main"]
