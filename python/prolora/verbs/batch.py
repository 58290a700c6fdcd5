"""LoRAs one after the other: an error ends its own and no other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..bases.base import Progress
from ..errors import ProLoRAError, explain_os_error
from ..reports.lora_report import MovedReport
from ..reports.outcome import Outcome
from .result import Transfer

LORA_FAILURES = (ProLoRAError, OSError, ArithmeticError, MemoryError, RuntimeError)
"""Errors that end the LoRA in which they happen and no other of the same call."""


def run_each(
    loras: Sequence[Path],
    outs: Sequence[Path],
    make: Callable[[int, Path, Progress | None], Transfer],
    progress: Progress | None,
) -> list[Outcome]:
    """Makes results one after the other; an error ends its LoRA and no other.

    `make` is called with the index of a LoRA, its output and the progress that is labelled for it.
    """
    outcomes = []
    for i, (lora, out) in enumerate(zip(loras, outs, strict=True)):
        started = time.perf_counter()
        try:
            label = f"LoRA {i + 1} of {len(loras)}:"
            report = make(i, out, label_stage(label, progress)).report
            is_kept = isinstance(report, MovedReport) and bool(report.before)
            done = Outcome(lora, out, report, kept=is_kept)
        except LORA_FAILURES as error:
            done = Outcome(lora, out, error=as_refusal(error))
        outcomes.append(replace(done, seconds=time.perf_counter() - started))
    return outcomes


def as_refusal(error: BaseException) -> ProLoRAError:
    """Turns an error of the system or of torch into one of prolora's."""
    if isinstance(error, ProLoRAError):
        return error
    text = explain_os_error(error) if isinstance(error, OSError) else str(error)
    refusal = ProLoRAError(text or type(error).__name__)
    refusal.__cause__ = error
    return refusal


def label_stage(what: str, progress: Progress | None) -> Progress | None:
    """Wraps the caller's callback, so that each name begins with the stage."""
    if progress is None:
        return None
    return lambda done, total, name: progress(done, total, f"{what} {name}")
