"""`python -m prolora` is the command `prolora`."""

from .cli import main

main()
