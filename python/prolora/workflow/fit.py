"""A LoRA fitted to running models: `fit`, from file to file, and several one after the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters import read_adapter
from ..bases import Base, BaseLike, open_pair
from ..core.precision import in_full_precision
from ..files.hub import keep_path
from .by_fitting.common_parts import CommonParts, share_parts
from .by_fitting.pipeline import fit_to_pipelines, plan_fit, prepare_fit
from .by_fitting.rows import outline_report
from .by_weights.base_pair import list_inputs
from .by_weights.decision import label_stage
from .fit_options import DEFAULT_FIT, FitChanges, FitOptions
from .options import LoraLike, settle_options, takes_options
from .outcome import Outcome
from .output_paths import (
    check_distinct,
    check_output,
    check_results_folder,
    make_folders,
    name_output,
)
from .pair_mover import Task
from .report import Report
from .result import Transfer, pack_plan, save_result
from .resume import Recipe

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes_options
@in_full_precision
def fit(
    lora: LoraLike,
    source: BaseLike,
    target: BaseLike,
    options: FitOptions = DEFAULT_FIT,
    *,
    out: str | PathLike[str] | None = None,
    dry_run: bool = False,
    **changes: Unpack[FitChanges],
) -> Transfer:
    """Fits a LoRA of one model to another that runs: no data and no captions, but both models.

    It reaches targets that moving by weights does not: trained apart, of another width or depth,
    with other latents, without some blocks. Both models are sampled with and without the LoRA, and
    a LoRA of the target is fitted to the change that it makes. Where that is no better on held-out
    samples than the LoRA moved by weights alone, that one is the result.

    Args:
        lora: as `transfer` takes it.
        source: the folder of the diffusers pipeline that the LoRA was trained on.
        target: the folder of the pipeline to fit it to.
        options: what is sampled, and how it is fitted.
        out: a file to write, or a folder for format "peft", as `transfer` takes it.
        dry_run: report what would be done, and whether weights would serve: no model runs.
        **changes: single options by name; they win over `options`.

    Returns:
        The LoRA of the target, with the report; after a dry run a report alone.

    Raises:
        InvalidOption: an option has a value that it does not take.
        UnsupportedFormat: a folder that is no pipeline, a file that cannot be read, or a result
            that `format` cannot hold.
        ShapeMismatch: the fit is to start from a copy, and none fits the target.
        NonFiniteWeights: NaN or Inf, named.
        WrongBase: the LoRA belongs to `target` and not to `source`.
        AlreadyMoved: prolora moved the LoRA before, to another base than `source`.
        TooLittleMemory: max_memory is below what the models need.
        UnrelatedBases: the held-out samples speak against the fit and against moving by weights.
        LowCoverage: fewer modules have a place than `min_coverage` asks for.
        OutputExists: something else has the name of `out`.
        OutputError: `out` cannot be written; the folder of kept parts belongs to other inputs.
    """
    options = settle_options(options, changes)
    bases = open_pair(source, target)
    if dry_run:
        return pack_plan(plan_fit(lora, *bases, options))
    if out is None:
        return fit_to_pipelines(lora, *bases, options)
    options = options.for_file()
    if not isinstance(lora, str | PathLike):  # in memory, of which no recipe is kept
        check_output(out, list_inputs(lora, *bases), options.overwrite)
        return save_result(fit_to_pipelines(lora, *bases, options), Path(out), options)
    file = keep_path(lora)
    recipe = Recipe.of(file, *bases, options)
    if not options.overwrite and recipe.is_made(Path(out)):
        job = prepare_fit(file, *bases, options, "outline")
        plan = outline_report(job.adapter, job.plan, *bases, options)
        return replace(pack_plan(plan), adapter=read_adapter(out))
    check_output(out, list_inputs(file, *bases), options.overwrite)
    return _fit_into(Path(out), recipe, options)


@takes_options
@in_full_precision
def fit_many(
    loras: Iterable[str | PathLike[str]],
    source: BaseLike,
    target: BaseLike,
    folder: str | PathLike[str],
    options: FitOptions = DEFAULT_FIT,
    **changes: Unpack[FitChanges],
) -> list[Outcome]:
    """Fits LoRAs one after the other, into a folder, under the names they have.

    Both pipelines are opened once, and asked only once what does not depend on the LoRA: what they
    said without one is kept in `resume`, or until the end in a temporary folder inside `folder`.
    A result that is there already, complete, and says in its header that it was made of this very
    LoRA, of these bases and in this way is left alone (unless `overwrite` is set): a run that was
    cut off goes on where it was. The folder is made if it does not exist.

    Args:
        loras: .safetensors files, PEFT folders and ids on the hub.
        source: as `fit` takes it.
        target: likewise.
        folder: where the results go.
        options: what is sampled, and how it is fitted.
        **changes: single options by name; they win over `options`.

    Returns:
        An outcome for each LoRA, in order. One that is refused does not stop the others.

    Raises:
        OutputError: the folder cannot be made, or two inputs would have one output.
        ProLoRAError: a base that cannot be opened.
    """
    options = settle_options(options, changes).for_file()
    paths = [keep_path(lora) for lora in loras]
    check_results_folder(folder, len(paths))
    old, new = open_pair(source, target)
    outs = [Path(folder) / name_output(lora, options.format or "auto") for lora in paths]
    check_distinct(paths, outs)
    make_folders({Path(folder)})
    outcomes = []
    with share_parts(options.resume, Path(folder), len(paths) > 1) as common:
        for i, (lora, out) in enumerate(zip(paths, outs, strict=True), 1):
            progress = label_stage(f"LoRA {i} of {len(paths)}:", options.progress)
            labelled = replace(options, progress=progress)
            outcomes.append(_attempt(lora, old, new, out, labelled, common))
    return outcomes


def _fit_into(
    out: Path, recipe: Recipe, options: FitOptions, common: CommonParts | None = None
) -> Transfer:
    inputs = recipe.lora, recipe.source, recipe.target
    return save_result(fit_to_pipelines(*inputs, options, recipe.describe, common), out, options)


def _attempt(
    lora: Path, source: Base, target: Base, out: Path, options: FitOptions, common: CommonParts
) -> Outcome:
    """Fits one LoRA of several; an error ends it and no other."""
    task = Task(lora, out)

    def fit_unless_made() -> Report | None:
        recipe = Recipe.of(lora, source, target, options)
        if task.is_made(recipe):
            return None
        check_output(out, list_inputs(lora, source, target), options.overwrite)
        return _fit_into(out, recipe, options, common).report

    task.finish(task.attempt(fit_unless_made))
    assert task.outcome is not None
    return task.outcome
