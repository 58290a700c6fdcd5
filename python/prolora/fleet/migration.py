"""Collections of LoRAs on their way to other bases: a current result in the folder is done.

A result's header has digests of all that was read for it, and it appears whole. So work done twice
gives the same file, a run that is started again does what is left, and any number of processes on
any number of machines may work on one folder without knowing of each other.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapters.lora import Lora
from ..bases.experts import choose_pairs, open_experts, pair_experts
from ..errors import InvalidOption, ProLoRAError
from ..reports.report import Sentence, read_again
from ..verbs.option_keywords import resolve_options, takes_options
from ..verbs.options import BEST
from ..verbs.result import read_verdict
from .batches import (
    DEFAULT_MIGRATION,
    Batch,
    Job,
    Migrated,
    MigrationOptions,
    move_batch,
    note_refusal,
    plan_batch,
)
from .listing import list_loras
from .on_ray import run_on_ray

StrPath = str | os.PathLike[str]
_BATCH = 32


@takes_options
def migrate(
    loras: StrPath | Iterable[StrPath],
    source: StrPath,
    target: StrPath | Sequence[StrPath],
    folder: StrPath,
    options: MigrationOptions = DEFAULT_MIGRATION,
    *,
    ray: str | None = None,
    shard: str | None = None,
    dry_run: bool = False,
    **changes: Any,
) -> list[Migrated]:
    """Moves a collection of LoRAs to one or more bases; run it again to go on.

    Results are `folder/TARGET/LORA-DIGITS.safetensors`, where the digits follow from the LoRA, some
    weights of the bases, the options and the version. One that is damaged, or made of what has
    changed since, is made again. Beside them `LORA-DIGITS.failed.json` says why a LoRA was
    refused; it is tried again by the next run.

    Args:
        loras: .safetensors files, folders, text files that list them, or addresses on the hub.
        source: the base that they were trained on: a file, a folder or an id on the hub.
        target: the bases to move to.
        folder: where the results go.
        options: how the LoRAs are moved.
        ray: address of a Ray cluster that does the work, or "local" for one on this machine.
        shard: only this part of the work, as "2/8", for the jobs of an array.
        dry_run: say what would move, and write nothing.
        **changes: single options by name; they win over `options`.

    Returns:
        What became of each LoRA on its way to each target, in no order.

    Raises:
        InvalidOption: an option has a value that it does not take.
        UnsupportedFormat: a LoRA, list or base that is not there.
        OutputError: the results cannot be written.
        ProLoRAError: Ray is missing or does not answer.
    """
    asked = resolve_options(options, changes)
    if asked.method == BEST or asked.overwrite:
        raise InvalidOption("a migration moves by weights, and replaces nothing")
    job = Job(os.path.abspath(folder), replace(asked.for_file(), progress=None))
    (base,), targets = _list_paths([source]), _list_paths(target)
    batches, loras_refused = assign_loras(list_loras(loras), base, targets, job)
    batches = _take_shard(batches, shard)
    # Processes that do the same work meet in the middle, and not at every batch.
    random.Random().shuffle(batches)
    batches.sort(key=lambda batch: (batch.source, batch.target, batch.expert))
    if ray is not None and not dry_run:
        results = run_on_ray(ray, batches, job)
    else:
        work = plan_batch if dry_run else move_batch
        results = (moved for batch in batches for moved in work(batch, job))
    total = len(loras_refused) + sum(len(batch.loras) for batch in batches)
    for moved in results:
        loras_refused.append(moved)
        if asked.progress:
            asked.progress(len(loras_refused), total, Path(moved.lora).name)
    return loras_refused


def _list_paths(paths: StrPath | Sequence[StrPath]) -> list[str]:
    """Paths as text, absolute where they are paths and not ids on the hub."""
    listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not listed or not all(isinstance(one, str | os.PathLike) for one in listed):
        raise InvalidOption(f"the bases of a migration are paths or ids, not {paths!r:.80}")
    return [os.path.abspath(p) if os.path.exists(p) else os.fspath(p) for p in listed]


def _take_shard(batches: list[Batch], shard: str | None) -> list[Batch]:
    if shard is None:
        return batches
    number, _, count = str(shard).partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise InvalidOption(f"shard is a part of the work, as 2/8, not {shard!r}")
    return batches[int(number) - 1 :: int(count)]


def assign_loras(
    loras: list[Path], source: str, targets: list[str], job: Job
) -> tuple[list[Batch], list[Migrated]]:
    """Returns the batches of a collection, and the outcomes of LoRAs of no expert."""
    experts = open_experts(source)
    by_target = {target: pair_experts(experts, open_experts(target)) for target in targets}
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    refused = []
    for target, pairs in by_target.items():
        for lora in loras:
            try:
                for pair, appended in choose_pairs(lora, pairs):
                    groups.setdefault((target, pair.expert), []).append((str(lora), appended))
            except ProLoRAError as error:
                batch = Batch("", target, "", ((str(lora), ""),))
                refused.append(note_refusal(batch, job, lora, error))
    return [
        Batch(source, target, expert, tuple(members[i : i + _BATCH]))
        for (target, expert), members in groups.items()
        for i in range(0, len(members), _BATCH)
    ], refused


def read_words(moved: Migrated) -> Sentence:
    """Reads the verdict of a result from its header."""
    with Lora.open(moved.out) as result:
        return read_again(read_verdict(result.metadata))
