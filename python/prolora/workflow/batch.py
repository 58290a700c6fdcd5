"""Many LoRAs at once: each weight is looked at once for all, one bad file stops no other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ..bases.cache.basis_cache import BasisCache
from ..bases.experts import Experts, ExpertsLike, choose_pairs, open_experts, pair_experts
from ..core.precision import in_full_precision
from ..errors import OutputError
from .options import (
    DEFAULT_OPTIONS,
    OptionChanges,
    TransferOptions,
    settle_options,
    takes_options,
)
from .outcome import Outcome
from .output_paths import check_distinct, check_name, name_output
from .pair_mover import PairMover, Task
from .resume import Recipe

Naming = Callable[[Path, str], str]
"""(LoRA, digest of all that its result is made of) -> the result's path below the folder."""

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes_options
@in_full_precision
def transfer_many(
    loras: Iterable[str | PathLike[str]],
    source: ExpertsLike | Experts,
    target: ExpertsLike | Experts,
    folder: str | PathLike[str],
    options: TransferOptions = DEFAULT_OPTIONS,
    *,
    naming: Naming | None = None,
    **changes: Unpack[OptionChanges],
) -> list[Outcome]:
    """Moves LoRAs into a folder, under the names they have (with the suffix the format needs).

    A result that is there already, complete, and says in its header that it was made of this very
    LoRA, of these bases and in this way is left alone: a run that was cut off goes on where it was.
    A LoRA whose place holds a file that prolora did not write is refused. With `overwrite` either
    is made again. The folder is made if it does not exist.

    Without `cache` what is learnt of the
    bases is kept for this call only; `progress` is called as progress(done, total,
    "LoRAs: module").

    A model of two experts (Wan 2.2) is given as the folder of its pipeline, or as (high noise, low
    noise). A LoRA whose name has "high_noise" or "low_noise" in it, "HIGH" or "LOW" in capitals, or
    either of these words at its end, is moved to that expert. Any other is moved to both, and the
    names of its results end in "_high_noise" and "_low_noise".

    Args:
        loras: .safetensors files and PEFT folders.
        source: the base that they were trained on, or its two experts.
        target: the base to move to, or its two experts.
        folder: where the results go.
        options: how to move them.
        naming: gives results other names: it is called with each LoRA and twelve digits that differ
            wherever the LoRA, a base, an option or the version does, and returns a path below the
            folder without the suffix. Results with the digits in their names never take each
            other's place.
        **changes: options by name, in place of those.

    Returns:
        An outcome for each LoRA and each expert that it is moved to, in order. A LoRA that is
        refused does not stop the others.

    Raises:
        OutputError: the folder cannot be made, or two inputs would have one output.
        UnsupportedFormat: the source alone has experts, and a LoRA's name does not tell one.
        ProLoRAError: a base that cannot be opened, or two that cannot be matched by similarity.
    """
    options = settle_options(options, changes).for_file()
    pairs = pair_experts(open_experts(source), open_experts(target))
    moves = [
        (Path(lora), pair, appended)
        for lora in loras
        for pair, appended in choose_pairs(Path(lora), pairs)
    ]
    check_name(folder)
    format = options.format or "auto"
    with BasisCache(options.cache).saving() as opened:
        tasks = [
            Task(lora, Path(folder) / name_output(lora, format, appended))
            for lora, _, appended in moves
        ]
        if naming is not None:
            for task, (_, pair, appended) in zip(tasks, moves, strict=True):
                recipe = partial(Recipe.of, task.lora, pair.source, pair.target, options)
                tail = name_output(task.lora, format, appended, stem="")
                task.attempt(partial(_rename, task, recipe, opened, Path(folder), naming, tail))
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
    task: Task,
    make_recipe: Callable[[], Recipe],
    cache: BasisCache,
    folder: Path,
    naming: Naming,
    tail: str,
) -> None:
    """Gives a result the name that a caller wants it to have."""
    task.recipe = make_recipe()
    task.out = folder / f"{naming(task.lora, task.recipe.digest(cache))}{tail}"


def make_folders(folders: Iterable[Path]) -> None:
    """Makes the folders of the results.

    Raises:
        OutputError: one cannot be made.
    """
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise OutputError(f"{folder}: the output folder cannot be made: {error}") from error
