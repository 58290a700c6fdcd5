"""The images of an evaluation: each is drawn once, and kept under what it depends on."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...bases import Base, vae
from ...bases.base import Progress
from ...bases.pipeline_identity import describe_pipeline_folder, describe_versions
from ...errors import NonFiniteWeights, OutputError, UnsupportedFormat
from ...files.hashing import hash_text
from ...files.jsontext import read_json_object
from ...files.managed_folder import FolderMarker, ManagedFolder
from ...files.ownership import check_replaceable, is_own, sign_png
from ...files.writing import check_writable, write_bytes_atomically
from ..by_fitting.showing import read_pixels, settle_settings
from ..evaluation_options import EvaluationOptions
from ..page.picture_file import write_png
from .entrants import WITH_LORA, Entrant, StrPath, Subject

if TYPE_CHECKING:
    from ...probe.pipelines import Pipeline

MADE_OF = "made_of"
"""The entry of the JSON that tells an evaluation from others."""
JSON_FILE, PAGE, IMAGES = "evaluation.json", "evaluation.html", "images"
"""What the folder of an evaluation holds."""
MARKER = FolderMarker(
    "EVALUATION.TAG",
    b"# This folder was made by prolora evaluate, which replaces its own files in it.\n",
)
_LARGEST = 1 << 15  # pixels of a side: images are kept as they were drawn
_KINDS = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Cell:
    """One image: of which LoRA, in which row, of which prompt, from which noise."""

    lora: str
    row: str
    prompt: str
    seed: int


class ImageFolder:
    """The images, each under a digest of what it depends on.

    Attributes:
        folder: of the evaluation.
        names: what is drawn -> the name of its image, in the order of the drawing.
        origins: what is drawn -> a digest of all that its image depends on but the device.
    """

    def __init__(
        self,
        out: StrPath,
        subjects: Sequence[Subject],
        bases: tuple[Base, Base],
        options: EvaluationOptions,
    ) -> None:
        """Makes the folder and names the images; draws nothing.

        Raises:
            OutputError: the folder cannot be made, or holds other things of these names.
        """
        from ...probe.checkpoint import hash_updates

        self._paths, self._options = find_pipelines(bases), options
        self.folder = make_evaluation_folder(out, options.overwrite)
        self.folder.make_folder(IMAGES)
        self.names: dict[Cell, str] = {}
        self.origins: dict[Cell, str] = {}
        self._entrants: dict[Cell, Entrant] = {}
        # How one side is sampled depends on the other where no size is asked.
        shared: list[Any] = [describe_versions(), options.settings]
        shared += [describe_pipeline_folder(path) for path in self._paths]
        for subject in subjects:
            for row, entrant in subject.entrants.items():
                updates = [hash_updates(part) for part in (entrant.denoiser, entrant.text)]
                # The source with a LoRA may have steps of its own.
                key = hash_text(json.dumps([shared, entrant.side, row == WITH_LORA, updates]))
                for prompt in subject.prompts:
                    for seed in options.seeds:
                        cell = Cell(subject.name, row, prompt, seed)
                        self.origins[cell] = hash_text(json.dumps([key, prompt, seed]))
                        digest = hash_text(f"{self.origins[cell]} {options.device}")
                        self.names[cell] = f"{digest[:32]}.png"
                        self._entrants[cell] = entrant

    def check_replaceable(self, made_of: Mapping[str, str]) -> None:
        """Refuses a folder whose evaluation is of something else, unless it may be replaced.

        Raises:
            OutputError: it is, or the JSON that says so is gone and the page is not.
        """
        file, page = (self.folder.find_place(name) for name in (JSON_FILE, PAGE))
        if self._options.overwrite or not (file.exists() or page.exists()):
            return
        before = read_json_object(file).get(MADE_OF) if file.exists() else None
        if before == made_of:
            return
        known = before if isinstance(before, Mapping) else {}
        what = "holds an evaluation of other files or settings"
        if not file.exists():
            what = f"has a page without its {JSON_FILE}, so that nobody knows of what it is"
        elif known.get("digest") == made_of["digest"]:
            what = (
                f"holds an evaluation of the same that was drawn on {known.get('device')}, and "
                f"this run draws on {made_of['device']}"
            )
        raise OutputError(
            f"{self.folder.path}: {what}; it is not replaced: name another folder, or allow it "
            "with `overwrite=True`, which keeps the images"
        )

    def draw_missing(self, progress: Progress | None) -> dict[tuple[str, str], str]:
        """Draws what is not there as it was written, first the source's, then the target's.

        Returns:
            (LoRA, row) -> why it has no images: a LoRA with which the model overflows.

        Raises:
            ProLoRAError: a pipeline that cannot be loaded or run, or gives no image.
        """
        failures: dict[tuple[str, str], str] = {}
        undrawn: dict[str, str] = {}
        from ...probe import pipelines

        places = {name: self.folder.find_place(IMAGES, name) for name in self.names.values()}
        there = {
            name for name, file in places.items() if file.is_file() and is_own(file, "picture")
        }
        missing = {name: cell for cell, name in self.names.items() if name not in there}
        if not missing:
            return {}
        tell = progress or (lambda done, total, name: None)
        models = []
        for path in self._paths:
            tell(len(there), len(places), f"opening {path.name}")
            models.append(pipelines.open_pipeline(path, self._options.device))
            models[-1].release(keep_denoiser=False)
        shared = vae.explain_different_latents(*self._paths) is None
        settings = settle_settings((models[0], models[1]), self._options.sampling, shared)
        for side, model in enumerate(models):
            model.restore()
            for name, cell in missing.items():
                entrant, place = self._entrants[cell], (cell.lora, cell.row)
                if entrant.side != side:
                    continue
                label = f"{cell.row}: {cell.prompt}"
                if place in failures:
                    undrawn[name] = failures[place]
                    tell(len(there) + len(undrawn), len(places), label)
                    continue
                asked = settings[side].with_lora() if cell.row == WITH_LORA else settings[side]
                with _run_entrant(model, entrant):
                    drawn = model.sample_latents(cell.prompt, asked, cell.seed, "pt")
                try:
                    png = sign_png(write_png(read_pixels(drawn), _LARGEST))
                except NonFiniteWeights as error:
                    if not (entrant.denoiser or entrant.text):
                        raise  # the model does that by itself
                    failures[place] = undrawn[name] = str(error)
                    tell(len(there) + len(undrawn), len(places), label)
                    continue
                write_bytes_atomically(places[name], png)
                there.add(name)
                tell(len(there) + len(undrawn), len(places), label)
            model.release(keep_denoiser=False)
        # Rows of equal updates have the same images.
        lost = ((c, undrawn[name]) for c, name in self.names.items() if name in undrawn)
        return {(cell.lora, cell.row): why for cell, why in lost}

    def keep(self, loras: Sequence[str], rows: Sequence[str]) -> None:
        """Forgets the images of all other LoRAs and rows; no file is removed."""
        kept = {c: name for c, name in self.names.items() if c.lora in loras and c.row in rows}
        self.names = kept

    def read(self, lora: str, row: str, prompt: str, seed: int) -> Any:
        """An image, as Pillow's `Image`."""
        name = self.names[Cell(lora, row, prompt, seed)]
        return read_image(self.folder.find_place(IMAGES, name))


@contextmanager
def _run_entrant(model: Pipeline, entrant: Entrant) -> Iterator[None]:
    """The model with the updates of a row beside its weights, in float32."""
    from ...probe.pipelines import run_text_encoders_beside
    from ...probe.precision import in_float32
    from ...probe.updates import run_beside

    with (
        run_text_encoders_beside(model, entrant.text),
        in_float32(model.denoiser),
        run_beside(model.denoiser, entrant.denoiser),
    ):
        yield


def make_evaluation_folder(out: StrPath, overwrite: bool) -> ManagedFolder:
    """The folder of an evaluation.

    Raises:
        OutputError: it cannot be made, or holds files of others.
    """
    folder = ManagedFolder.make(out, MARKER)
    for name in (JSON_FILE, PAGE):
        check_replaceable(Path(out) / name, "report", overwrite)
    return folder


def check_evaluation_folder(out: StrPath, overwrite: bool) -> None:
    """Refuses a folder that cannot be one of an evaluation; makes none.

    Raises:
        OutputError: as `make_evaluation_folder`.
    """
    if Path(out).is_dir():
        make_evaluation_folder(out, overwrite)
    check_writable(Path(out) / JSON_FILE)


def find_pipelines(bases: tuple[Base, Base]) -> tuple[Path, Path]:
    """The folders of both pipelines.

    Raises:
        UnsupportedFormat: one of them is not the folder of a whole pipeline, or would run code of
            another package.
    """
    from ...probe.pipelines.opening import read_runnable_index

    ours, theirs = (base.path or Path(base.name) for base in bases)
    for path in (ours, theirs):
        read_runnable_index(path)
    return ours, theirs


def read_image(path: Path) -> Any:
    """An image file in RGB, as Pillow's `Image`.

    Raises:
        UnsupportedFormat: it is no image that Pillow reads, or Pillow is missing.
    """
    try:
        from PIL import Image

        return Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    except ImportError as error:
        raise UnsupportedFormat('Pillow is missing: pip install "prolora[evaluate]"') from error
    except Exception as error:  # its type depends on what is wrong with the file
        raise UnsupportedFormat(f"{path}: cannot be read as an image: {error}") from error


def read_images(folder: StrPath) -> list[Any]:
    """The images of a folder, by name.

    Raises:
        UnsupportedFormat: there is none, or one cannot be read.
    """
    files = sorted(f for f in Path(folder).glob("*") if f.suffix.lower() in _KINDS)
    if not files:
        raise UnsupportedFormat(f"{folder}: no images ({', '.join(_KINDS)}) are in this folder")
    return [read_image(file) for file in files]
