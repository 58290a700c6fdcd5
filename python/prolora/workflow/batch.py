"""Many LoRAs at once: each weight is looked at once for all, one bad file stops no other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.folder import PEFT_WEIGHTS
from ..bases.cache.basis_cache import BasisCache
from ..bases.experts import (
    ExpertPair,
    Experts,
    ExpertsLike,
    choose_pairs,
    open_experts,
    pair_experts,
)
from ..core.precision import in_full_precision
from ..errors import InvalidOption, ProLoRAError, UnrelatedBases
from ..files.hub import keep_path
from ..files.store import digest
from .best import UNMOVED, BestWay, tell_fitted, tell_refused
from .by_weights.ledger import LORA_FAILURES
from .dry_run import plan_report
from .fit import fit_many
from .options import (
    BEST,
    DEFAULT_OPTIONS,
    OptionChanges,
    TransferOptions,
    settle_options,
    takes_options,
)
from .outcome import Outcome
from .output_paths import check_distinct, check_results_folder, make_folders, name_output
from .pair_mover import PairMover, Task, as_refusal
from .result import Transfer, save_result
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
            wherever the LoRA, the size or time of a base, an option or the version does, and
            returns a path below the folder without the suffix.
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
    options = settle_options(options, changes).for_file()
    paths = [keep_path(lora) for lora in loras]
    check_results_folder(folder, len(paths))
    old, new = open_experts(source), open_experts(target)
    if options.method == BEST:
        if naming is not None:
            raise InvalidOption("results of method 'best' keep their names: leave `naming` out")
        return _move_best(paths, old, new, Path(folder), options)
    return _move_by_weights(paths, pair_experts(old, new), folder, options, naming)


def _move_by_weights(
    loras: list[Path],
    pairs: Sequence[ExpertPair],
    folder: str | PathLike[str],
    options: TransferOptions,
    naming: Naming | None = None,
    hold_back: Callable[[Transfer, Path], bool] | None = None,
) -> list[Outcome]:
    """Moves LoRAs between experts; one that is held back is reported, and not written."""
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
                mover = replace(mover, hold_back=hold_back)
                for _ in mover.run(mine, opened, [task.lora for task in mine]):
                    pass
    return [task.outcome for task in tasks if task.outcome is not None]


def _rename(
    task: Task, pair: ExpertPair, options: TransferOptions, folder: Path, naming: Naming, tail: str
) -> None:
    """Gives a result the name that a caller wants it to have."""
    task.recipe = Recipe.of(task.lora, pair.source, pair.target, options)
    task.out = folder / f"{naming(task.lora, digest(task.recipe.made_of)[:12])}{tail}"


def _move_best(
    loras: list[Path], old: Experts, new: Experts, folder: Path, options: TransferOptions
) -> list[Outcome]:
    """Moves all by weights together, and fits those that need it.

    An existing fit stays, and a refused one is tried again. What weights give is written before the
    models run, whatever ends that; but where something existed before, which is not lost meanwhile,
    only if it is the result.
    """
    outs = [folder / name_output(lora, options.format or "auto") for lora in loras]
    check_distinct(loras, outs)  # all at once: a fit may exist, and the other LoRA not
    pairs = pair_experts(old, new)
    way = BestWay.of(pairs[0].source, pairs[0].target, options)
    fitted = [lora for lora in loras if way.runs and _is_fitted(lora, way, folder)]
    rest = [lora for lora in loras if lora not in fitted]
    refusal: ProLoRAError | None = UnrelatedBases(way.latents) if way.latents else None
    moved: list[Outcome] = []
    held: dict[Path, Transfer] = {}

    def hold_back(done: Transfer, out: Path) -> bool:
        if way.explain_need(done.report) and _is_taken(out):
            held[out] = done
        return out in held

    if refusal is None:
        try:
            moved = _move_by_weights(rest, pairs, folder, way.by_weights, None, hold_back)
        except UNMOVED as error:  # of all of them
            refusal = error
            if not way.runs:
                raise
    if refusal is not None:
        moved = [Outcome(lora, folder / lora.name, error=refusal) for lora in rest]
    needs = {outcome.lora: need for outcome in moved if (need := _explain_need(outcome, way))}
    asked, fits = [*fitted, *needs], []
    if asked:
        fits = fit_many(asked, way.source, way.target, folder, way.by_fit)
    by_lora = {outcome.lora: outcome for outcome in fits}
    for i, outcome in enumerate(moved):
        if outcome.out in held and by_lora[outcome.lora].error:  # it is the result after all
            moved[i] = _write_held(outcome, held.pop(outcome.out), way)
    found = [_choose(by_lora.get(o.lora), o, needs.get(o.lora, ""), way) for o in moved]
    found += [by_lora[lora] for lora in fitted]
    return sorted(found, key=lambda outcome: loras.index(outcome.lora))


def _is_taken(out: Path) -> bool:
    """Returns whether a result's path holds a LoRA: file or adapter folder."""
    return (out / PEFT_WEIGHTS if out.is_dir() else out).exists()


def _write_held(outcome: Outcome, done: Transfer, way: BestWay) -> Outcome:
    """Writes a result that was held back, and returns its outcome."""
    try:
        return replace(outcome, report=save_result(done, outcome.out, way.by_weights).report)
    except LORA_FAILURES as error:
        return replace(outcome, report=None, error=as_refusal(error))


def _is_fitted(lora: Path, way: BestWay, folder: Path) -> bool:
    """Returns whether an earlier run has fitted this LoRA in this way."""
    if way.by_fit.overwrite:
        return False
    try:
        recipe = Recipe.of(lora, way.source, way.target, way.by_fit)
        out = folder / name_output(lora, way.by_fit.format or "auto")
        return recipe.is_made(out)
    except ProLoRAError:  # moving it says why
        return False


def _explain_need(outcome: Outcome, way: BestWay) -> str:
    """Explains why a LoRA of several needs a fit; "" if it does not."""
    if outcome.error is not None:
        return way.explain_need(outcome.error) if isinstance(outcome.error, UNMOVED) else ""
    report = outcome.report
    if report is None and way.runs:  # it was there already
        report = plan_report(outcome.lora, way.source, way.target, way.by_weights)
    return way.explain_need(report) if report else ""


def _choose(fit: Outcome | None, moved: Outcome, need: str, way: BestWay) -> Outcome:
    """Chooses the fit's outcome, or the move's if the fit failed."""
    if fit is not None and (fit.error is None or moved.error is not None):
        report = fit.report and tell_fitted(fit.report, need)
        return replace(fit, report=report, seconds=moved.seconds + fit.seconds)
    report = moved.report
    if report is not None:
        report = way.tell_weights(report)
        if fit is not None and fit.error is not None:
            report = tell_refused(report, need, fit.error)
    return replace(moved, report=report, seconds=moved.seconds + (fit.seconds if fit else 0.0))
