"""The whole command line."""

from .commands import build_app

app = build_app()
