"""What moving a LoRA gives, in images: drawn, judged by metrics, compared with the copy."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..bases import BaseLike, open_base
from ..core.precision import in_full_precision
from ..errors import InvalidOption, NonFiniteWeights
from ..files.hashing import hash_parts, hash_text
from ..files.ownership import mark_json
from .evaluating.drawing import (
    JSON_FILE,
    MADE_OF,
    PAGE,
    ImageFolder,
    check_evaluation_folder,
    find_pipelines,
    read_images,
)
from .evaluating.entrants import SOURCE, TRAINED_THERE, WITH_LORA, Subject, read_subjects
from .evaluating.evaluation import Evaluation
from .evaluating.metrics import JUDGES, ask_metric, identify_metric, open_metric
from .evaluation_options import (
    DEFAULT_EVALUATION,
    LORA,
    TRAINED,
    EvaluationChanges,
    EvaluationOptions,
)
from .options import settle_options, takes_options
from .page.document import PictureGrid
from .page.picture_file import write_png

if TYPE_CHECKING:
    from typing_extensions import Unpack

StrPath = str | PathLike[str]
_LIKE = {
    LORA: (WITH_LORA, "the source with the LoRA, image by image"),
    TRAINED: (TRAINED_THERE, "the target with the LoRA trained on it, image by image"),
}
"""Reference -> the row that images should look like, and what to call it."""
_NOT_GIVEN = "no model was given, and nothing is downloaded"


@takes_options
@in_full_precision
def evaluate(
    source: BaseLike,
    target: BaseLike,
    lora: StrPath | Sequence[StrPath],
    moved: Sequence[StrPath] | Mapping[str, StrPath],
    out: StrPath,
    options: EvaluationOptions = DEFAULT_EVALUATION,
    **changes: Unpack[EvaluationChanges],
) -> Evaluation:
    """Draws what moved LoRAs give, and compares them with the copy by metrics.

    The source with the LoRA and without, the target alone, the target with the copied LoRA, with
    every moved one and with one that was trained there draw the same prompts from the same noise.
    Images are kept in `out`, with a page and all scores as JSON: a run that was cut off goes on
    there, and ends with the same JSON. A LoRA with which a model overflows is left out, and told.

    Args:
        source: the folder of the diffusers pipeline that the LoRA was trained on.
        target: the folder of the pipeline that it was moved to.
        lora: a .safetensors file, a PEFT folder or an id on the hub; a folder or a list of several.
        moved: what became of it, by any method, or a mapping of names to that; for several LoRAs
            folders with a file of the same name for each.
        out: the folder for images, page and JSON.
        options: what is drawn, and what judges it.
        **changes: options by name, in place of those.

    Returns:
        The scores, the verdict and the page.

    Raises:
        InvalidOption: an option has a value that it does not take, or two rows one name.
        UnsupportedFormat: a side that is no pipeline folder, a metric whose model is not there or
            is another one, a LoRA that cannot be read.
        WrongBase: a LoRA that does not belong to its model.
        OutputError: `out` holds files of others, or an evaluation of other files or settings.
        ProLoRAError: a pipeline or a metric that fails.
    """
    options = settle_options(options, changes)
    bases = open_base(source), open_base(target)
    find_pipelines(bases)
    check_evaluation_folder(out, options.overwrite)
    metrics = options.metrics or {}
    _check_metrics(metrics)
    own, wanted = Path(os.path.realpath(out)), Path(os.path.realpath(str(options.reference)))
    if options.reference not in _LIKE and own in (wanted, *wanted.parents):
        raise InvalidOption("`reference` lies in the output's folder, which holds what is judged")
    given = [] if options.reference in _LIKE else read_images(options.reference)
    subjects = read_subjects(lora, moved, bases, options)
    images = ImageFolder(out, subjects, bases, options)
    made_of = _list_made_of(images, given, options)
    images.check_replaceable(made_of)
    drawn = images.draw_missing(options.progress)
    subjects, rows, skipped = _leave_out(subjects, drawn)
    images.keep([subject.name for subject in subjects], rows)
    like, reference = _LIKE.get(str(options.reference), ("", "the images that were given"))
    if like and like not in rows:
        skipped[f"likeness to {reference}"] = skipped[like]
        like = reference = ""
    scores, lower = _judge_all(images, subjects, rows, like or given, options, skipped)
    done = Evaluation(
        source=bases[0].name,
        target=bases[1].name,
        subjects=tuple(subjects),
        seeds=options.seeds,
        rows=rows,
        scores=scores,
        lower=lower,
        reference=reference,
        skipped=skipped | {j.title: _NOT_GIVEN for n, j in JUDGES.items() if n not in metrics},
        images=images.names,
        settings=options.settings,
        grid=_make_grid(images, subjects, rows, options),
    )
    told = done.to_dict() | {MADE_OF: made_of}
    images.folder.write_text(JSON_FILE, mark_json("report", told))
    images.folder.write_text(PAGE, done.to_html())
    return done


def _list_made_of(
    images: ImageFolder, given: Sequence[Any], options: EvaluationOptions
) -> dict[str, str]:
    """What tells an evaluation from others before anything is drawn: the device, and all else.

    Scores do not count: few metrics give the same bits each time.

    Args:
        images: to be drawn.
        given: the images of the reference, where it is a folder.
        options: of the evaluation.
    """
    drawn = [[asdict(cell), origin] for cell, origin in images.origins.items()]
    judges = {name: identify_metric(way) for name, way in sorted((options.metrics or {}).items())}
    like = [hash_parts([f"{image.size} ", image.tobytes()]) for image in given]
    asked = [judges, like or str(options.reference), options.sampling.shown_prompts]
    digest = hash_text(json.dumps([drawn, asked]))
    return {"device": str(options.device), "digest": digest}


def _leave_out(
    subjects: Sequence[Subject], drawn: Mapping[tuple[str, str], str]
) -> tuple[list[Subject], tuple[str, ...], dict[str, str]]:
    """LoRAs and rows that all have images of, and why which others are left out.

    Args:
        subjects: all LoRAs.
        drawn: (LoRA, row) -> why it could not be drawn. One that others could be drawn in is left
            out itself, and else the row.

    Raises:
        NonFiniteWeights: no LoRA is left.
    """
    skipped = {row: why for subject in subjects for row, why in subject.failures.items()}
    by_row: dict[str, dict[str, str]] = {}
    for (name, row), why in drawn.items():
        by_row.setdefault(row, {})[name] = why
    skipped |= {row: max(x.values()) for row, x in by_row.items() if len(x) == len(subjects)}
    lost: dict[str, str] = {}
    for (name, row), why in drawn.items():
        if row not in skipped:
            lost[name] = f"{lost[name]}; {row}: {why}" if name in lost else f"{row}: {why}"
    kept = [subject for subject in subjects if subject.name not in lost]
    if not kept:
        raise NonFiniteWeights(f"none of the LoRAs can be drawn: {max(lost.values())}")
    rows = tuple(row for row in subjects[0].entrants if row not in skipped)
    return kept, rows, skipped | lost


def _judge_all(
    images: ImageFolder,
    subjects: Sequence[Subject],
    rows: tuple[str, ...],
    like: str | list[Any],
    options: EvaluationOptions,
    skipped: dict[str, str],
) -> tuple[dict[str, dict[str, Tensor]], frozenset[str]]:
    """Score -> row -> values, and the scores of which less is better; adds to what is skipped."""
    scores: dict[str, dict[str, Tensor]] = {}
    lower: set[str] = set()
    for name, way in (options.metrics or {}).items():
        metric = open_metric(name, way, options.device)
        judged = {row: _judge_row(name, metric, row, images, like) for row in rows}
        for score in dict.fromkeys(score for found in judged.values() for score in found):
            values = {row: found[score] for row, found in judged.items() if score in found}
            if all(len(x) == len(subjects) for x in values.values()):
                scores[score] = values
            else:
                skipped[score] = f"{name} gives it for some of the LoRAs only"
        lower |= set(getattr(metric, "lower", ()))
    return scores, frozenset(lower & scores.keys())


def _check_metrics(metrics: Mapping[str, Any]) -> None:
    """Opens each metric and lets it judge grey images, before anything is drawn.

    Raises:
        ProLoRAError: it cannot, and why.
    """
    if metrics:
        from PIL import Image

        grey = [Image.new("RGB", (64, 64), (127, 127, 127))] * 3
        said: set[str] = set()
        for name, way in metrics.items():
            metric = open_metric(name, way, None)
            found = ask_metric(name, metric, grey, ["a prompt"] * 3, [grey] * 3)
            if twice := said & found.keys():
                raise InvalidOption(f"two of `metrics` give the score {min(twice)!r}: rename one")
            said |= found.keys()


def _judge_row(
    name: str, metric: Any, row: str, images: ImageFolder, like: str | list[Any]
) -> dict[str, Tensor]:
    """Score -> values [LoRAs, prompts, seeds] of a row; of the bare source none.

    Args:
        name: of the metric.
        metric: opened.
        row: whose images are judged.
        images: drawn.
        like: the row that they should look like, or the images.
    """
    said: dict[str, list[list[float]]] = {}
    cells = [cell for cell in images.names if cell.row == row]
    seeds = len({cell.seed for cell in cells})
    for lora in dict.fromkeys(cell.lora for cell in cells if row != SOURCE):
        own = [cell for cell in cells if cell.lora == lora]
        reference = [like] * len(own) if like and like != row else []
        if isinstance(like, str) and reference:
            reference = [[images.read(lora, like, cell.prompt, cell.seed)] for cell in own]
        pictures = [images.read(lora, row, cell.prompt, cell.seed) for cell in own]
        found = ask_metric(name, metric, pictures, [cell.prompt for cell in own], reference)
        for score, values in found.items():
            said.setdefault(score, []).append(values)
    stacked = {score: torch.tensor(rows, dtype=torch.float64) for score, rows in said.items()}
    return {score: x.reshape(len(x), -1, seeds) for score, x in stacked.items()}


def _make_grid(
    images: ImageFolder,
    subjects: Sequence[Subject],
    rows: tuple[str, ...],
    options: EvaluationOptions,
) -> PictureGrid | None:
    """Some of the images: LoRAs and prompts spread evenly, all from the first noise."""
    places = [(subject.name, prompt) for subject in subjects for prompt in subject.prompts]
    count = min(options.sampling.shown_prompts, len(places))
    shown = [places[i * len(places) // count] for i in range(count)]
    names = [f"{lora}: {prompt}" if len(subjects) > 1 else prompt for lora, prompt in shown]
    columns = [
        [write_png(_read_pixels(images.read(lora, row, prompt, options.seeds[0])))
         for lora, prompt in shown]
        for row in rows
    ]  # fmt: skip
    caption = "Each row is one prompt, drawn by every model from the same noise."
    return PictureGrid(rows, names, columns, caption) if shown else None


def _read_pixels(image: Any) -> Tensor:
    """An image of Pillow as [3, h, w] from 0 to 1."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(image.height, image.width, 3).movedim(2, 0) / 255
