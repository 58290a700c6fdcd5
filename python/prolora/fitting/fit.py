"""A LoRA fitted to running models: `fit`, from file to file, and several one after the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from ..bases import Base, BaseLike, open_pair
from ..bases.base import Progress
from ..core.precision import in_full_precision
from ..files.hub import keep_path
from ..moving.batch import make_each
from ..moving.option_keywords import settle_options, takes_options
from ..moving.options import LoraLike
from ..moving.output_paths import check_distinct, check_results_folder, make_folders, name_output
from ..moving.result import Transfer, make_file, pack_plan
from ..reports.outcome import Outcome
from .common_parts import CommonParts, share_parts, watch_pipelines
from .fit_pipelines import fit_to_pipelines, plan_fit, weigh_fit
from .settings import DEFAULT_FIT, FitOptions


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
    **changes: Any,
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
        OutputExists: something else has the name of `out`.
        OutputError: `out` or the folder of kept parts cannot be written.
    """
    options = settle_options(options, changes)
    bases = open_pair(source, target)
    if dry_run:
        return pack_plan(weigh_fit(lora, *bases, options))
    if out is None:
        return fit_to_pipelines(lora, *bases, options)
    return _fit_into(lora, *bases, Path(out), options.for_file())


@takes_options
@in_full_precision
def fit_many(
    loras: Iterable[str | PathLike[str]],
    source: BaseLike,
    target: BaseLike,
    folder: str | PathLike[str],
    options: FitOptions = DEFAULT_FIT,
    **changes: Any,
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
    with share_parts(options.resume, Path(folder), len(paths) > 1) as common:

        def make(i: int, out: Path, progress: Progress | None) -> Transfer:
            labelled = replace(options, progress=progress)
            return _fit_into(paths[i], old, new, out, labelled, common)

        return make_each(paths, outs, make, options.progress)


def _fit_into(
    lora: LoraLike,
    source: Base,
    target: Base,
    out: Path,
    options: FitOptions,
    common: CommonParts | None = None,
) -> Transfer:
    """Fits a LoRA from file to file; a result of the same recipe is kept."""
    bases = source, target
    return make_file(
        (lora, source, target, options),
        out,
        lambda opened: plan_fit(opened, *bases, options),
        lambda opened: fit_to_pipelines(opened, *bases, options, common),
        digest_bases=watch_pipelines(*bases),
    )
