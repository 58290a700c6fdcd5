"""The main job: a LoRA of one base in, the LoRA of another base out."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters import read_adapter
from ..adapters.lora import Lora
from ..bases import Base, BaseLike, open_pair
from ..files.hub import keep_path
from .best import BestWay
from .by_weights.base_pair import list_inputs, move_lora
from .dry_run import plan_report
from .fit_options import FitOptions
from .lora_report import MovedReport
from .options import (
    BEST,
    DEFAULT_OPTIONS,
    LoraLike,
    OptionChanges,
    TransferOptions,
    settle_options,
    takes_options,
)
from .output_paths import check_name, check_output
from .result import Transfer, pack_plan, save_result
from .resume import Recipe, read_verdict

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes_options
def transfer(
    lora: LoraLike,
    source: BaseLike,
    target: BaseLike,
    options: TransferOptions = DEFAULT_OPTIONS,
    *,
    out: str | PathLike[str] | None = None,
    dry_run: bool = False,
    **changes: Unpack[OptionChanges],
) -> Transfer:
    """Moves a LoRA to another base model, without training and without data.

    Args:
        lora: a .safetensors file, a PEFT folder, an id on the hub, a state dict, (state dict,
            `peft.LoraConfig`) or an `Adapter`.
        source: the base that the LoRA was trained on: a file, a folder, an id on the hub, a mapping
            name -> tensor, an nn.Module or an opened `Base`.
        target: the base to move to, in any of these forms.
        options: how to move it.
        out: a file to write, or a folder for format "peft"; checked before any work. A result that
            exists, and was made of the same LoRA, bases, options and version, is kept.
        dry_run: say what would be done, from headers alone; nothing is written.
        **changes: single options by name; they win over `options`.

    Returns:
        The LoRA of the target, with the report; after a dry run a report alone.

    Raises:
        InvalidOption: an option has a value that it does not take.
        UnsupportedFormat: a file, key or adapter type that cannot be read exactly, or a result that
            `format` cannot hold.
        ShapeMismatch: an update or a pair of weights that does not fit.
        NonFiniteWeights: NaN or Inf, named. All of these before any SVD runs.
        WrongBase: the LoRA belongs to `target` and not to `source`, or the two are one model.
        AlreadyMoved: prolora moved the LoRA before, to another base than `source`.
        OutputExists: something else has the name of `out`.
        OutputError: `out` cannot be written, or is an input; out_rank is a size that one column a
            module exceeds.
        TooLittleMemory: max_memory is below what the largest weight needs.
        UnrelatedBases: method "auto", and the weights have nothing in common.
        LowCoverage: fewer modules moved than `min_coverage` asks for.
    """
    options = settle_options(options, changes)
    bases = open_pair(source, target)
    if dry_run:
        return pack_plan(plan_report(lora, *bases, options))
    if out is not None:
        check_name(out)
        return _move_file(lora, *bases, Path(out), options.for_file())
    if options.method == BEST:
        return BestWay.of(*bases, options).move(lora)
    return move_lora(lora, *bases, options)


def _move_file(
    lora: LoraLike, source: Base, target: Base, out: Path, options: TransferOptions
) -> Transfer:
    """Moves a LoRA from file to file; a result of the same recipe is kept."""
    bases = source, target
    if not isinstance(lora, str | PathLike):  # in memory, of which no recipe is kept
        check_output(out, list_inputs(lora, *bases), options.overwrite)
        done = BestWay.of(*bases, options).move(lora) if options.method == BEST else None
        return save_result(done or move_lora(lora, *bases, options), out, options)
    way = BestWay.of(*bases, options) if options.method == BEST else None
    ways: list[TransferOptions | FitOptions]
    ways = [way.by_weights, way.by_fit] if way else [options]
    with Lora.open(keep_path(lora)) as file:
        recipes = [Recipe.of(file, *bases, how) for how in ways]
        if not options.overwrite and any(recipe.is_made(out) for recipe in recipes):
            planned = plan_report(file, *bases, way.by_weights if way else options)
            assert isinstance(planned, MovedReport)
            return Transfer(read_adapter(out), replace(planned, before=read_verdict(out)[0]))
        check_output(out, list_inputs(file, *bases), options.overwrite)
        if way:
            done = way.move(file, for_file=True)
        else:
            done = move_lora(file, *bases, options, recipes[0].describe)
        if options.progress:
            moved = len(done.adapter.updates)
            options.progress(moved, moved, f"writing {out.name}")
        return save_result(done, out, options)
