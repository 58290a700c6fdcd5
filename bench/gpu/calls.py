"""The five calls and their steps."""

from __future__ import annotations

import importlib

from .steps import Bench, Step

CALLS = ("correct", "anchors", "ours", "why", "sanitize")


def list_steps(bench: Bench) -> list[Step]:
    """The steps of a call, what matters most first."""
    module = importlib.import_module(f".{bench.call}", __package__)
    return list(module.list_steps(bench))
