"""The command line: arguments in, library calls, tables or JSON out. No logic of its own."""

from .app import app, main

__all__ = ["app", "main"]
