"""What the nodes do with prolora: paths in, paths and a report out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import prolora
from prolora.bases.cache.basis_cache import default_folder

AUTO = "auto"
METHODS = (AUTO, *(name for name in prolora.METHODS if name != "probe"))
FORMATS = ("comfyui", AUTO, "kohya", "diffusers")
NO_LORA = "(none)"
MOVED = "zz-moved"
"""The folder of results, which comes last in ComfyUI's lists."""

GENERIC_NAMES = ("diffusion_pytorch_model", "model", "unet", "transformer")
"""What files and folders of any model are called."""

USUAL = {"method": AUTO, "strength": None, "out_rank": "exact", "format": FORMATS[0]}
MOST_BYTES = 100

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Place:
    """Where the results of one target go, and what they are called.

    Attributes:
        root: ComfyUI's folder of LoRAs.
        target: the target's name below ComfyUI's folder of such models.
    """

    root: Path
    target: str

    @property
    def folder(self) -> Path:
        """The folder: all parts of the target's name that tell something."""
        parts = Path(self.target).with_suffix("").parts
        telling = [part for part in parts if part not in GENERIC_NAMES]
        name = make_plain("-".join(telling or parts))
        return self.root / MOVED / (name or "target")

    def name(self, lora: str, settings: str, digest: str) -> Path:
        """A result's path below `folder`: in folders as the LoRA is, what tells most first.

        Args:
            lora: its name in ComfyUI's list.
            settings: the unusual ones, in words.
            digest: of all that the result is made of.
        """
        inside = Path(lora)
        words = (make_plain(inside.stem), settings, digest)
        return inside.with_name("-".join(word for word in words if word))


def make_plain(text: str) -> str:
    """A text as every file system takes it for a part of a name."""
    plain = re.sub(r"[^\w.+-]+", "_", text).strip("._")
    return plain.encode()[-MOST_BYTES:].decode(errors="ignore")


def describe_settings(options: Mapping[str, object]) -> str:
    """The settings that are not the usual ones, as a name holds them."""
    chosen = [options.get(name) or usual for name, usual in USUAL.items()]
    return make_plain(
        "-".join(str(x) for x, usual in zip(chosen, USUAL.values(), strict=True) if x != usual)
    )


def move_loras(
    loras: Mapping[str, Path],
    source: Path,
    target: Path,
    place: Place,
    progress: Progress,
    **options: object,
) -> list[prolora.Outcome]:
    """Moves LoRAs to where they belong; what is there already, made so, is left alone.

    Args:
        loras: files by their names in ComfyUI's list.
        source: the base that they were trained on.
        target: the base that they move to.
        place: where the results go.
        progress: called as progress(done, total, name); what it raises ends the job.
        **options: of `prolora.transfer_many`: method, strength, format, out_rank.
    """
    settings, names = describe_settings(options), {path: name for name, path in loras.items()}
    if options.get("format") == FORMATS[0] and prolora.open_base(target).family is None:
        options["format"] = AUTO  # of an unknown family, ComfyUI reads what it read before
    used = {place.folder}

    def naming(lora: Path, digest: str) -> str:
        inside = place.name(names[lora], settings, digest)
        used.update(place.folder / parent for parent in inside.parents)
        return str(inside)

    try:
        return prolora.transfer_many(
            list(loras.values()),
            source,
            target,
            place.folder,
            naming=naming,
            cache=default_folder(),
            progress=progress,
            **options,
        )
    finally:
        for folder in sorted({*used, place.root / MOVED}, reverse=True):  # the innermost first
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def describe(report: prolora.Report) -> str:
    """What was kept and lost, and why modules stay behind."""
    left = [
        f"{count} modules {status}: {reason}."
        for (status, reason), count in report.reasons().items()
    ]
    return "\n".join([*report.sentences(), *left])


def move_one(
    lora: Mapping[str, Path],
    source: Path,
    target: Path,
    place: Place,
    progress: Progress,
    **options: object,
) -> tuple[Path, str]:
    """`move_loras` of one: the file, and what was kept and lost; a page of that is beside it.

    Raises:
        ValueError: it cannot be moved; one sentence says why.
    """
    try:
        (outcome,) = move_loras(lora, source, target, place, progress, **options)
        page = outcome.out.with_suffix(".html")
        if outcome.report is not None:
            outcome.report.save(page)
    except prolora.ProLoRAError as error:
        raise ValueError(str(error)) from None
    if outcome.error is not None:
        raise ValueError(str(outcome.error)) from None
    if outcome.report is None:
        there = f" Its report is {page.name}, beside it." if page.exists() else ""
        return outcome.out, f"{outcome.out.name} was there already, made so of the same.{there}"
    return outcome.out, describe(outcome.report)


def summarise(names: Iterable[str], outcomes: Sequence[prolora.Outcome]) -> str:
    """A line for each LoRA, and one for all."""
    lines = []
    for name, outcome in zip(names, outcomes, strict=True):
        detail = outcome.status
        if outcome.error is not None:
            detail += f": {outcome.error}"
        elif outcome.report is not None:
            detail += f": {outcome.report.sentences()[0]}"
        lines.append(f"{name} — {detail}")
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
