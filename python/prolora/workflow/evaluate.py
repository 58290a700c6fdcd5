"""What moving a LoRA gives, in images: drawn, judged by metrics, compared with the copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..bases import BaseLike, open_base
from ..core.precision import in_full_precision
from ..errors import InvalidOption
from ..files.ownership import mark_json
from .evaluating.drawing import (
    JSON_FILE,
    PAGE,
    Cell,
    ImageFolder,
    find_pipelines,
    list_images,
    list_seeds,
    read_image,
)
from .evaluating.entrants import SOURCE, TARGET, WITH_LORA, Subject, read_subjects
from .evaluating.entrants import TRAINED as TRAINED_ROW
from .evaluating.evaluation import Evaluation
from .evaluating.metrics import ask_metric, check_metric, find_lower, name_missing, open_metric
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
_SETTINGS = (
    "steps",
    "size",
    "guidance",
    "target_steps",
    "target_guidance",
    "lora_steps",
    "lora_guidance",
)


@takes_options
@in_full_precision
def evaluate(
    source: BaseLike,
    target: BaseLike,
    lora: StrPath,
    moved: Sequence[StrPath] | Mapping[str, StrPath],
    out: StrPath,
    options: EvaluationOptions = DEFAULT_EVALUATION,
    **changes: Unpack[EvaluationChanges],
) -> Evaluation:
    """Draws what moved LoRAs give, and compares them with the copy by metrics.

    The source with the LoRA and without, the target alone, the target with the copied LoRA, with
    every moved one and with one that was trained there draw the same prompts from the same noise.
    Images are kept in `out`, with a page and all scores as JSON: a run that was cut off goes on
    there, and ends with the same JSON.

    Args:
        source: the folder of the diffusers pipeline that the LoRA was trained on.
        target: the folder of the pipeline that it was moved to.
        lora: a .safetensors file or a PEFT folder; a folder or a list of several.
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
        OutputError: `out` holds files of others.
        ProLoRAError: a pipeline or a metric that fails.
    """
    options = settle_options(options, changes)
    bases = open_base(source), open_base(target)
    find_pipelines(bases)
    metrics = options.metrics or {}
    for name, given in metrics.items():
        check_metric(name, given)
    wanted = [] if options.reference in (LORA, TRAINED) else list_images(options.reference)
    subjects = read_subjects(lora, moved, bases, options)
    if len({subject.name for subject in subjects}) < len(subjects):
        raise InvalidOption("two of the LoRAs have one name: rename one of them")
    images = ImageFolder(out, subjects, bases, options)
    images.draw_missing(options.progress)
    rows, skipped = _choose_rows(subjects)
    judged = _Judged(images, subjects, rows, options)
    scores: dict[str, dict[str, Tensor]] = {}
    lower: set[str] = set()
    theirs = [read_image(path) for path in wanted]
    for name, given in metrics.items():
        metric = open_metric(name, given, options.device)
        for score, by_row in judged.ask(name, metric, theirs).items():
            scores[score] = by_row
            lower |= {score} & find_lower(metric)
    done = Evaluation(
        bases[0].name,
        bases[1].name,
        tuple(subjects),
        judged.seeds,
        rows,
        scores,
        judged.measure_changes(),
        frozenset(lower),
        _name_reference(options),
        skipped | name_missing(metrics),
        {cell: name for cell, name in images.cells.items() if cell.row in rows},
        {name: getattr(options.sampling, name) for name in _SETTINGS},
        judged.make_grid(options.sampling.shown_prompts),
    )
    images.folder.write_text(JSON_FILE, mark_json("report", done.to_dict()))
    images.folder.write_text(PAGE, done.to_html())
    return done


def _choose_rows(subjects: Sequence[Subject]) -> tuple[tuple[str, ...], dict[str, str]]:
    """The rows that all LoRAs have, and why others are left out."""
    failures = {row: why for subject in subjects for row, why in subject.failures.items()}
    rows = tuple(row for row in subjects[0].entrants if row not in failures)
    return rows, failures


def _name_reference(options: EvaluationOptions) -> str:
    """What images are compared with; in which folder is nobody's business."""
    if options.reference == LORA:
        return "the source with the LoRA, image by image"
    if options.reference == TRAINED:
        return "the target with the LoRA trained on it, image by image"
    return "the images that were given"


class _Judged:
    """The images in order, as the metrics are asked about them."""

    def __init__(
        self,
        images: ImageFolder,
        subjects: Sequence[Subject],
        rows: tuple[str, ...],
        options: EvaluationOptions,
    ) -> None:
        self._images, self._subjects, self._rows = images, subjects, rows
        self.seeds = list_seeds(options.sampling)
        self._wanted = {LORA: WITH_LORA, TRAINED: TRAINED_ROW}.get(str(options.reference), "")

    def _list_cells(self, subject: Subject, row: str) -> list[Cell]:
        return [Cell(subject.name, row, p, seed) for p in subject.prompts for seed in self.seeds]

    def _stack(self, values: Sequence[Sequence[float]]) -> Tensor:
        """Values by LoRA as [LoRAs, prompts, seeds]."""
        stacked = torch.tensor(values, dtype=torch.float64)
        return stacked.reshape(len(stacked), -1, len(self.seeds))

    def ask(self, name: str, metric: Any, theirs: Sequence[Any]) -> dict[str, dict[str, Tensor]]:
        """Score -> row -> values, of all rows but the bare source.

        Args:
            name: of the metric.
            metric: opened.
            theirs: images that all should look like; empty where those of a row are the reference.
        """
        said: dict[str, dict[str, list[list[float]]]] = {}
        for subject in self._subjects:
            for row in self._rows:
                if row == SOURCE:
                    continue
                cells = self._list_cells(subject, row)
                reference = [theirs] * len(cells) if theirs else []
                if self._wanted and self._wanted != row:
                    others = self._list_cells(subject, self._wanted)
                    reference = [[self._images.read(cell)] for cell in others]
                pictures = [self._images.read(cell) for cell in cells]
                found = ask_metric(name, metric, pictures, [c.prompt for c in cells], reference)
                for score, values in found.items():
                    said.setdefault(score, {}).setdefault(row, []).append(values)
        return {s: {r: self._stack(v) for r, v in rows.items()} for s, rows in said.items()}

    def measure_changes(self) -> dict[str, Tensor]:
        """Row -> how far its images are from the bare model's; see `Evaluation`."""
        changes = {}
        for row in self._rows:
            bare = SOURCE if row == WITH_LORA else TARGET
            if row in (SOURCE, TARGET):
                continue
            changes[row] = self._stack(
                [
                    [
                        self._measure(cell, Cell(cell.subject, bare, cell.prompt, cell.seed))
                        for cell in self._list_cells(subject, row)
                    ]
                    for subject in self._subjects
                ]
            )
        return changes

    def _measure(self, cell: Cell, bare: Cell) -> float:
        ours, theirs = (_read_pixels(self._images.read(one)) for one in (cell, bare))
        return float((ours - theirs).square().mean().sqrt())

    def make_grid(self, count: int) -> PictureGrid | None:
        """Some of the images: LoRAs and prompts spread evenly, from the first noise."""
        places = [(subject, prompt) for subject in self._subjects for prompt in subject.prompts]
        count = min(count, len(places))
        shown = [places[i * len(places) // count] for i in range(count)]
        if not shown:
            return None
        several = len(self._subjects) > 1
        names = [f"{subject.name}: {p}" if several else p for subject, p in shown]
        columns = [
            [
                write_png(
                    _read_pixels(self._images.read(Cell(subject.name, row, prompt, self.seeds[0])))
                )
                for subject, prompt in shown
            ]
            for row in self._rows
        ]
        caption = "Each row is one prompt, drawn by every model from the same noise."
        return PictureGrid(self._rows, names, columns, caption)


def _read_pixels(image: Any) -> Tensor:
    """An image of Pillow as [3, h, w] from 0 to 1."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(image.height, image.width, 3).movedim(2, 0).double() / 255
