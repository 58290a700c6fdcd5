"""The images of an evaluation: each is drawn once, and kept under what it depends on."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...bases import Base, vae
from ...bases.base import Progress
from ...bases.pipeline_identity import (
    describe_pipeline_folder,
    describe_versions,
    digest_facts,
)
from ...errors import UnsupportedFormat
from ...files.hashing import hash_text
from ...files.managed_folder import FolderMarker, ManagedFolder
from ...files.ownership import is_own, sign_png
from ...files.writing import write_bytes_atomically
from ...probe.settings import FitSettings
from ..by_fitting.showing import read_pixels, settle_settings
from ..evaluation_options import EvaluationOptions
from ..page.picture_file import write_png
from .entrants import Entrant, StrPath, Subject

if TYPE_CHECKING:
    from ...probe.pipelines import Pipeline

JSON_FILE, PAGE, IMAGES = "evaluation.json", "evaluation.html", "images"
"""What the folder of an evaluation holds."""
MARKER = FolderMarker(
    "EVALUATION.TAG",
    b"# This folder was made by prolora evaluate, which replaces its own files in it.\n",
)
_LARGEST = 1 << 15  # pixels of a side: images are kept as they were drawn


@dataclass(frozen=True)
class Cell:
    """One image of an evaluation."""

    subject: str
    row: str
    prompt: str
    seed: int


class ImageFolder:
    """The images, each under a digest of what it depends on.

    Attributes:
        folder: of the evaluation.
        cells: what is drawn -> the name of its image, in the order of the drawing.
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
            UnsupportedFormat: a base that is not the folder of a whole pipeline.
        """
        from ...probe.checkpoint import hash_updates

        paths = find_pipelines(bases)
        self.folder = ManagedFolder.make(out, MARKER, (JSON_FILE, PAGE, IMAGES))
        self.folder.make_folder(IMAGES)
        self._paths, self._sampled, self._device = paths, options.sampling, options.device
        self.cells: dict[Cell, str] = {}
        self._entrants: dict[Cell, Entrant] = {}
        # How one side is sampled depends on the other where no size is asked.
        shared = {
            "pipelines": [digest_facts(describe_pipeline_folder(path)) for path in paths],
            "settings": self._sampled.describe_samples() | {"prompts": None, "images": None},
            "of target": [self._sampled.target_steps, self._sampled.target_guidance],
            "device": str(options.device),
        } | describe_versions()
        for subject in subjects:
            for row, entrant in subject.entrants.items():
                updates = [hash_updates(part) for part in (entrant.denoiser, entrant.text)]
                way = [entrant.side, *updates, entrant.is_original]
                for prompt in subject.prompts or ("",):
                    for seed in list_seeds(self._sampled):
                        cell = Cell(subject.name, row, prompt, seed)
                        text = json.dumps([shared, way, prompt, seed], sort_keys=True)
                        self.cells[cell] = f"{hash_text(text)[:32]}.png"
                        self._entrants[cell] = entrant

    def draw_missing(self, progress: Progress | None) -> None:
        """Draws what is not there yet, first all of the source, then all of the target.

        Raises:
            ProLoRAError: a pipeline that cannot be loaded or run, or gives no image.
        """
        missing = {name: cell for cell, name in self.cells.items() if not self._is_there(name)}
        if not missing:
            return
        from ...probe.pipelines import open_pipeline

        total = len(set(self.cells.values()))
        done = total - len(missing)
        models = []
        for side, path in enumerate(self._paths):
            if progress:
                progress(done, total, f"opening {path.name}")
            models.append(open_pipeline(path, self._device))
            models[side].release(keep_denoiser=False)
        shared = vae.explain_different_latents(*self._paths) is None
        settings = settle_settings((models[0], models[1]), self._sampled, shared)
        for side, model in enumerate(models):
            model.restore()
            for name, cell in missing.items():
                entrant = self._entrants[cell]
                if entrant.side == side:
                    own = settings[side]
                    asked = own.with_lora() if entrant.is_original else own
                    with run_entrant(model, entrant):
                        drawn = model.sample_latents(cell.prompt, asked, cell.seed, "pt")
                    png = sign_png(write_png(read_pixels(drawn), _LARGEST))
                    write_bytes_atomically(self.find(name), png)
                    done += 1
                    if progress:
                        progress(done, total, f"{cell.row}: {cell.prompt}")
            model.release(keep_denoiser=False)

    def find(self, name: str) -> Path:
        """The path of an image."""
        return self.folder.find_place(IMAGES, name)

    def _is_there(self, name: str) -> bool:
        """Whether an image is there as it was written."""
        path = self.find(name)
        return path.is_file() and is_own(path, "picture")

    def read(self, cell: Cell) -> Any:
        """An image, as Pillow's `Image`."""
        return read_image(self.find(self.cells[cell]))


def list_seeds(sampled: FitSettings) -> tuple[int, ...]:
    """The seeds of the images of each prompt."""
    return tuple(range(sampled.seed, sampled.seed + sampled.images))


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


@contextmanager
def run_entrant(model: Pipeline, entrant: Entrant) -> Iterator[None]:
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


def read_image(path: Path) -> Any:
    """An image file in RGB, as Pillow's `Image`.

    Raises:
        UnsupportedFormat: it is no image that Pillow reads, or Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise UnsupportedFormat(
            'images are read by Pillow: pip install "prolora[evaluate]"'
        ) from error
    try:
        return Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    except Exception as error:  # its type depends on what is wrong with the file
        raise UnsupportedFormat(f"{path}: cannot be read as an image: {error}") from error


def list_images(folder: StrPath) -> list[Path]:
    """The images of a folder, by name.

    Raises:
        UnsupportedFormat: there is none.
    """
    kinds = (".png", ".jpg", ".jpeg", ".webp")
    path = Path(folder)
    found = sorted(f for f in path.glob("*") if f.suffix.lower() in kinds)
    if not found:
        raise UnsupportedFormat(f"{path}: there are no images ({', '.join(kinds)}) in this folder")
    return found
