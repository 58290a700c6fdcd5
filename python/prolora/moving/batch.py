"""Many LoRAs at once: each weight is looked at once for all, one bad file stops no other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path

from ..bases.base import Progress
from ..bases.cache.basis_cache import BasisCache
from ..bases.experts import ExpertPair, choose_pairs
from ..files.store import digest
from ..reports.lora_report import MovedReport
from ..reports.outcome import Outcome
from .decision import label_stage
from .ledger import LORA_FAILURES
from .options import TransferOptions
from .output_paths import check_distinct, make_folders, name_output
from .pair_mover import PairMover, Task, as_refusal
from .result import Transfer
from .resume import Recipe

Naming = Callable[[Path, str], str]
"""(LoRA, digest of all that its result is made of) -> the result's path below the folder."""


def move_many(
    loras: list[Path],
    pairs: Sequence[ExpertPair],
    folder: str | PathLike[str],
    options: TransferOptions,
    naming: Naming | None = None,
) -> list[Outcome]:
    """Moves LoRAs between experts by weights, each weight looked at once for all."""
    moves = [(lora, *chosen) for lora in loras for chosen in choose_pairs(lora, pairs)]
    format = options.format or "auto"
    with BasisCache(options.cache).saving() as opened:
        tasks = [
            Task(lora, Path(folder) / name_output(lora, format, appended))
            for lora, _, appended in moves
        ]
        if naming is not None:
            for task, (_, pair, appended) in zip(tasks, moves, strict=True):
                tail = name_output(task.lora, format, appended, stem="")
                task.attempt(partial(_rename, task, pair, options, Path(folder), naming, tail))
        live = [task for task in tasks if task.outcome is None]
        check_distinct([task.lora for task in live], [task.out for task in live])
        make_folders({Path(folder), *(task.out.parent for task in tasks)})
        for pair in pairs:
            mine = [task for task, move in zip(tasks, moves, strict=True) if move[1] is pair]
            if mine:
                mover = PairMover.open(pair.source, pair.target, options, opened)
                for _ in mover.run(mine, opened, [task.lora for task in mine]):
                    pass
    return [task.outcome for task in tasks if task.outcome is not None]


def _rename(
    task: Task, pair: ExpertPair, options: TransferOptions, folder: Path, naming: Naming, tail: str
) -> None:
    """Gives a result the name that a caller wants it to have."""
    task.recipe = Recipe.of(task.lora, pair.source, pair.target, options)
    task.out = folder / f"{naming(task.lora, digest(task.recipe.made_of)[:12])}{tail}"


def make_each(
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
            kept = isinstance(report, MovedReport) and bool(report.before)
            done = Outcome(lora, out, report, kept=kept)
        except LORA_FAILURES as error:
            done = Outcome(lora, out, error=as_refusal(error))
        outcomes.append(replace(done, seconds=time.perf_counter() - started))
    return outcomes
