"""Both ways to move a LoRA: by weights, or with method "best", which may run the models."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .adapters.lora import Lora
from .bases import Base, BaseLike, open_pair
from .bases.base import Progress
from .bases.experts import Experts, ExpertsLike, choose_pairs, open_experts, pair_experts
from .errors import ProLoRAError
from .files.hub import keep_path
from .files.store import digest
from .moving.base_pair import BasePair
from .moving.lazy_bases import narrow_base
from .moving.peft_modules import add_peft_config
from .reports.outcome import Outcome
from .verbs.batch import run_each
from .verbs.option_keywords import resolve_options, takes_options
from .verbs.options import BEST, DEFAULT_OPTIONS, LoraLike, TransferOptions
from .verbs.output_paths import check_distinct, check_results_folder, make_folders, name_output
from .verbs.result import Recipe, Transfer, as_dry_run

if TYPE_CHECKING:
    from .fitting.best_way import WeightsElseFit
    from .fitting.kept_parts import KeptParts

Naming = Callable[[Path, str], str]
"""(LoRA, digest of all that its result is made of) -> the result's path below the folder."""


@takes_options
def transfer(
    lora: LoraLike,
    source: BaseLike,
    target: BaseLike,
    options: TransferOptions = DEFAULT_OPTIONS,
    *,
    out: str | PathLike[str] | None = None,
    dry_run: bool = False,
    **changes: Any,
) -> Transfer:
    """Moves a LoRA to another base model, without training and without data.

    Args:
        lora: a .safetensors file, a PEFT folder, an id on the hub, a state dict, (state dict,
            `peft.LoraConfig`), an `Adapter`, or the `Transfer` that another call returned. A state
            dict of PEFT has no alpha: it is taken from a source module that has the adapter, else
            a warning says that the scale is 1.
        source: the base that the LoRA was trained on: a file, a folder, an id on the hub, a mapping
            name -> tensor (of one that is not a dict, only the modules that the LoRA changes are
            read), an nn.Module or an opened `Base`.
        target: the base to move to, in any of these forms.
        options: how to move it; `method` also takes one of your own, as that of `project` does.
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
        WrongBase: the LoRA is for another model than `source`, or the two are one model.
        AlreadyMoved: prolora moved the LoRA before, to another base than `source`.
        OutputExists: something else has the name of `out`.
        OutputError: `out` cannot be written, or is an input.
        TooLittleMemory: max_memory is below what the largest weight needs.
        UnrelatedBases: method "auto", and the weights have nothing in common.
    """
    options = resolve_options(options, changes)
    options = options if out is None else options.for_file()
    lora = add_peft_config(lora, source)
    pair = open_pair(narrow_base(source, lora), narrow_base(target, lora))
    way = _choose_way(*pair, options, dry_run)
    return as_dry_run(way.preview(lora)) if dry_run else way.run(lora, out, options.progress)


@takes_options
def transfer_many(
    loras: Iterable[str | PathLike[str]],
    source: ExpertsLike | Experts,
    target: ExpertsLike | Experts,
    folder: str | PathLike[str],
    options: TransferOptions = DEFAULT_OPTIONS,
    *,
    naming: Naming | None = None,
    **changes: Any,
) -> list[Outcome]:
    """Moves LoRAs into a folder, under their own names.

    The suffix follows the format. A result that exists, and says in its header that it was made of
    this very LoRA, of these bases and in this way, is kept: a run that was cut off goes on where it
    was. A LoRA whose result's path holds anything else is refused. With `overwrite` either is made
    again. The folder is made if it does not exist.

    Without `cache` what is learnt of the bases is kept for this call only; `progress` is called as
    progress(done, total, "LoRAs: module").

    A model of two experts (Wan 2.2) is given as the folder of its pipeline, or as (high noise, low
    noise). A LoRA whose name has "high_noise" or "low_noise" in it, "HIGH" or "LOW" in capitals, or
    either of these words at its end, is moved to that expert. Any other is moved to both, and the
    names of its results end in "_high_noise" and "_low_noise".

    Args:
        loras: .safetensors files, PEFT folders and ids on the hub.
        source: the base that they were trained on, or its two experts.
        target: the base to move to, or its two experts.
        folder: where the results go.
        options: how to move them.
        naming: gives results other names: it is called with each LoRA and twelve digits that differ
            wherever the LoRA, an option, the version or one of three weights of a base does, and
            returns a path below the folder without the suffix. A result of that name is made again
            where anything else that it depends on has changed.
        **changes: single options by name; they win over `options`.

    Returns:
        An outcome for each LoRA and each expert that it is moved to, in order. A LoRA that is
        refused does not stop the others.

    Raises:
        OutputError: the folder has the name of a file, or cannot be made, or two inputs would have
            one output.
        UnsupportedFormat: the source alone has experts, and a LoRA's name does not tell one.
        ProLoRAError: a base that cannot be opened, or two that cannot be matched by similarity.
    """
    options = resolve_options(options, changes).for_file()
    paths, results, refused = [keep_path(lora) for lora in loras], Path(folder), {}
    check_results_folder(folder, len(paths))
    bases = (narrow_base(base, *paths) for base in (source, target))
    pairs = pair_experts(*map(open_experts, bases))
    moves = [(lora, *chosen) for lora in paths for chosen in choose_pairs(lora, pairs)]
    format, outs = options.format or "auto", []
    for i, (lora, pair, end) in enumerate(moves):
        name = name_output(lora, format, end)
        try:
            if naming is not None:
                with Lora.open(lora) as opened:
                    made_of = Recipe(opened, pair.source, pair.target, options).made_of
                    digits = digest(made_of)[:12]
                name = naming(lora, digits) + name_output(lora, format, end, stem="")
        except ProLoRAError as error:
            refused[i] = error
        outs.append(results / name)
    live = [i for i in range(len(moves)) if i not in refused]
    check_distinct([moves[i][0] for i in live], [outs[i] for i in live])
    used = {id(pair): pair for _, pair, _ in moves}
    with ExitStack() as stack:
        if options.cache is None and options.chosen.needs_bases and len(moves) > len(used):
            cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="prolora-"))
            options = replace(options, cache=cache)
        parts = None
        if options.method == BEST:
            shared = _load_best_way().KeptParts.share(None, results, len(paths) > 1)
            parts = stack.enter_context(shared)
        ways = {
            key: _choose_way(one.source, one.target, options, parts=parts)
            for key, one in used.items()
        }
        make_folders({results, *(out.parent for out in outs)})
        for way in ways.values():
            if isinstance(way, BasePair):
                way.match_blocks()

        def make(i: int, out: Path, progress: Progress | None) -> Transfer:
            if i in refused:
                raise refused[i]
            way = ways[id(moves[i][1])]
            return way.run(moves[i][0], out, progress, renews=naming is not None)

        return run_each([lora for lora, _, _ in moves], outs, make, options.progress)


def _choose_way(
    source: Base,
    target: Base,
    options: TransferOptions,
    dry_run: bool = False,
    parts: KeptParts | None = None,
) -> BasePair | WeightsElseFit:
    """Opens the way that the options ask for; fits of several LoRAs share `parts`."""
    if options.method == BEST:
        way: WeightsElseFit = _load_best_way().WeightsElseFit.of(
            source, target, options, dry_run, parts
        )
        return way
    return BasePair.open(source, target, options, dry_run=dry_run)


def _load_best_way() -> ModuleType:
    """Loads what may run the models; refuses where this copy of prolora cannot fit."""
    try:
        from .fitting import best_way
    except ModuleNotFoundError as error:
        raise ProLoRAError(
            f"method 'best' may run the models, and this copy of prolora lacks {error.name}; "
            "choose another method"
        ) from error
    return best_way
