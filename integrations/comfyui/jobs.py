"""What the nodes do with prolora: paths in, paths and a report out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import prolora
from prolora.bases.cache.basis_cache import default_folder

AUTO = "auto"
METHODS = (AUTO, *(name for name in prolora.METHODS if name != "probe"))
FORMATS = ("comfyui", AUTO, "kohya", "diffusers")
NO_LORA = "(none)"

Progress = Callable[[int, int, str], None]


def make_folder_name(target: Path, method: str) -> str:
    """The folder below `moved/` for a target: its name, and the method if one was chosen."""
    name = re.sub(r"[^\w.+-]+", "_", target.stem).strip("._") or "target"
    return name if method == AUTO else f"{name}-{method}"


def move_loras(
    loras: Sequence[Path],
    source: Path,
    target: Path,
    root: Path,
    progress: Progress,
    **options: object,
) -> list[prolora.Outcome]:
    """Moves LoRAs into `root`/moved/target; what is there already, made so, is left alone.

    Args:
        loras: files.
        source: the base that they were trained on.
        target: the base that they move to.
        root: ComfyUI's folder of LoRAs.
        progress: called as progress(done, total, name); what it raises ends the job.
        **options: of `prolora.transfer_many`: method, strength, format, out_rank.
    """
    if options.get("format") == FORMATS[0] and prolora.open_base(target).family is None:
        options["format"] = AUTO  # of an unknown family, ComfyUI reads what it read before
    folder = root / "moved" / make_folder_name(target, str(options.get("method", AUTO)))
    try:
        return prolora.transfer_many(
            loras, source, target, folder, cache=default_folder(), progress=progress, **options
        )
    finally:
        for empty in (folder, folder.parent):
            if empty.is_dir() and not any(empty.iterdir()):
                empty.rmdir()


def describe(report: prolora.Report) -> str:
    """What was kept and lost, and why modules stay behind."""
    left = [
        f"{count} modules {status}: {reason}."
        for (status, reason), count in report.reasons().items()
    ]
    return "\n".join([*report.sentences(), *left])


def move_one(
    lora: Path, source: Path, target: Path, root: Path, progress: Progress, **options: object
) -> tuple[Path, str]:
    """`move_loras` of one: the file, and what was kept and lost; a page of that is beside it.

    Raises:
        ValueError: it cannot be moved; one sentence says why.
    """
    try:
        (outcome,) = move_loras([lora], source, target, root, progress, **options)
    except prolora.ProLoRAError as error:
        raise ValueError(str(error)) from None
    if outcome.error is not None:
        raise ValueError(str(outcome.error)) from None
    page = outcome.out.with_suffix(".html")
    if outcome.report is None:
        there = f" Its report is {page.name}, beside it." if page.exists() else ""
        return outcome.out, f"{outcome.out.name} was there already, made so of the same.{there}"
    outcome.report.save(page)
    return outcome.out, describe(outcome.report)


def summarise(outcomes: Sequence[prolora.Outcome]) -> str:
    """A line for each LoRA, and one for all."""
    lines = []
    for outcome in outcomes:
        detail = outcome.status
        if outcome.error is not None:
            detail += f": {outcome.error}"
        elif outcome.report is not None:
            detail += f": {outcome.report.sentences()[0]}"
        lines.append(f"{outcome.lora.name} — {detail}")
    failed = sum(outcome.error is not None for outcome in outcomes)
    lines.append(f"{len(outcomes) - failed} of {len(outcomes)} LoRAs are in place.")
    return "\n".join(lines)


def advise(source: Path, target: Path, lora: Path | None, progress: Progress) -> str:
    """Go or no-go from the weights of two bases, and where a LoRA's modules would go.

    Raises:
        ValueError: the two cannot be compared; one sentence says why.
    """
    try:
        comparison = prolora.compare(
            source, target, rank=None, cache=default_folder(), progress=progress
        )
        parts = comparison.sentences()
        if lora is not None:
            parts.append(describe(prolora.plan_report(lora, source, target)))
    except prolora.ProLoRAError as error:
        raise ValueError(str(error)) from None
    return "\n".join(parts)
