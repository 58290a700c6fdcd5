"""The main job: a LoRA of one base in, the LoRA of another base out."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ..bases import BaseLike, open_pair
from ..files.hub import keep_path
from .best import BestWay
from .by_weights.base_pair import list_inputs, move_lora
from .dry_run import plan_report
from .options import (
    BEST,
    DEFAULT_OPTIONS,
    LoraLike,
    OptionChanges,
    TransferOptions,
    settle_options,
    takes_options,
)
from .output_paths import check_output
from .report import Report
from .result import Transfer, save_result
from .resume import Recipe, read_verdict

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes_options
def transfer(
    lora: LoraLike,
    source: BaseLike,
    target: BaseLike,
    options: TransferOptions = DEFAULT_OPTIONS,
    **changes: Unpack[OptionChanges],
) -> Transfer:
    """Turns a LoRA of one base model into the LoRA of another, without training and without data.

    Args:
        lora: a .safetensors file, a PEFT folder, an id on the hub, a state dict, (state dict,
            `peft.LoraConfig`) or an `Adapter`.
        source: the base that the LoRA was trained on: a file, a folder, an id on the hub, a mapping
            name -> tensor, an nn.Module or an opened `Base`.
        target: the base to move to, in any of these forms.
        options: how to move it.
        **changes: options by name, in place of those.

    Returns:
        The LoRA of the target in memory, with the report.

    Raises:
        InvalidOption: an option has a value that it does not take.
        UnsupportedFormat: a file, key or adapter type that cannot be read exactly, or a result that
            `format` cannot hold.
        ShapeMismatch: an update or a pair of weights that does not fit.
        NonFiniteWeights: NaN or Inf, named. All of these before any SVD runs.
        WrongBase: the LoRA belongs to `target` and not to `source`, or the two are one model.
        AlreadyMoved: prolora moved the LoRA before, to another base than `source`.
        OutputError: out_rank is a size that one column a module exceeds.
        TooLittleMemory: max_memory is below what the largest weight needs.
        UnrelatedBases: method "auto", and the weights have nothing in common.
        LowCoverage: fewer modules moved than `min_coverage` asks for.
    """
    options = settle_options(options, changes)
    bases = open_pair(source, target)
    if options.method == BEST:
        return BestWay.of(*bases, options).move(lora)
    return move_lora(lora, *bases, options)


@takes_options
def transfer_file(
    lora: str | PathLike[str],
    source: BaseLike,
    target: BaseLike,
    out: str | PathLike[str],
    options: TransferOptions = DEFAULT_OPTIONS,
    **changes: Unpack[OptionChanges],
) -> Report:
    """Moves a LoRA from file to file: `transfer`, then `Transfer.save`.

    The output path is checked before any work.

    Args:
        lora: a .safetensors file, a PEFT folder or an id on the hub.
        source: the base that the LoRA was trained on, as `transfer` takes it.
        target: the base to move to, likewise.
        out: the file to write, or a folder for format "peft".
        options: how to move it.
        **changes: options by name, in place of those.

    Returns:
        What was kept and lost. A result that exists, and was made of the same LoRA, bases, options
        and version, is kept: the report is that of a dry run then, with the verdict of the first.

    Raises:
        OutputExists: something has that name.
        OutputError: out cannot be written, or is an input.
        ProLoRAError: everything that `transfer` raises.
    """
    options = settle_options(options, changes).for_file()
    file, bases = keep_path(lora), open_pair(source, target)
    way = BestWay.of(*bases, options) if options.method == BEST else None
    recipes = [
        Recipe.of(file, *bases, how) for how in ([way.by_weights, way.by_fit] if way else [options])
    ]
    if not options.overwrite and any(recipe.is_made(Path(out)) for recipe in recipes):
        planned = plan_report(file, *bases, way.by_weights if way else options)
        return replace(planned, before=read_verdict(Path(out))[0])
    check_output(out, list_inputs(file, *bases), options.overwrite)
    if way:
        done = way.move(file, for_file=True)
    else:
        done = move_lora(file, *bases, options, recipes[0].describe)
    if options.progress:
        moved = len(done.adapter.updates)
        options.progress(moved, moved, f"writing {Path(out).name}")
    return save_result(done, Path(out), options)
