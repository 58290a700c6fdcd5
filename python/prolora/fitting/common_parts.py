"""Shared parts of several fits between the same two pipelines."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path

from ..bases import Base
from ..bases.cache.basis_cache import default_folder
from ..bases.pipeline_files import is_pipeline
from ..bases.pipeline_identity import describe_pipeline_folder, digest_facts
from ..core.validation import DeviceLike
from ..errors import UnrelatedBases
from ..files.state import FileState, read_state
from . import pipelines
from .checkpoint import Checkpoints
from .pipelines import Pipeline

PARTS = ".prolora-parts"
"""The folder of parts that were not asked for, beside the results until all are made."""


def watch_pipelines(source: Base, target: Base) -> Callable[[], dict[str, str]] | None:
    """Returns what digests two pipelines after their use; None where one is no pipeline.

    A digest is "" where a file has changed meanwhile.
    """
    sides = {"source": source.path, "target": target.path}
    folders = {side: path for side, path in sides.items() if path and is_pipeline(path)}
    if len(folders) < len(sides):
        return None
    known = default_folder()  # remembers digests, where there is a cache at all
    memory, before = known if known.is_dir() else None, _read_states(folders)

    def digest() -> dict[str, str]:
        facts = {side: describe_pipeline_folder(x, memory) for side, x in folders.items()}
        same = _read_states(folders) == before
        return {side: digest_facts(x) if same else "" for side, x in facts.items()}

    return digest


def _read_states(folders: Mapping[str, Path]) -> dict[Path, FileState]:
    files = (file for folder in folders.values() for file in folder.rglob("*"))
    return {file: read_state(file) for file in files if file.is_file()}


class CommonParts:
    """Open pipelines and a results folder, for one fit or several.

    Attributes:
        folder: where results are kept; None keeps nothing.
        is_temporary: the folder was not asked for. Then parts that the next LoRA cannot use are
            removed from it.
    """

    def __init__(self, folder: str | PathLike[str] | None, is_temporary: bool = False) -> None:
        """Takes the folder; opens nothing."""
        self.folder = None if folder is None else Path(folder)
        self.is_temporary = is_temporary
        self._models: dict[str, Pipeline] = {}
        self._checkpoints: Checkpoints | None = None

    def open_checkpoints(self, source: Base, target: Base) -> Checkpoints:
        """Returns the kept results of these two pipelines."""
        if self._checkpoints is None:
            self._checkpoints = Checkpoints(self.folder, watch_pipelines(source, target))
        return self._checkpoints

    def make_room(self, anew: bool) -> None:
        """Frees the weights of the fit before; `anew` lets the pipelines go altogether."""
        for model in self._models.values():
            model.release(keep_denoiser=False)
        if anew:
            self._models.clear()

    def open(self, side: str, folder: Path, device: DeviceLike) -> Pipeline:
        """Opens a pipeline, or returns it as the last fit left it.

        See `Pipeline.restore`.
        """
        if side not in self._models:
            self._models[side] = pipelines.open_pipeline(folder, device)
        return self._models[side]

    @contextlib.contextmanager
    def one_fit(self) -> Iterator[None]:
        """Clears up after the fit of each LoRA.

        Pipelines that an error has left in the middle of something are opened anew.
        """
        try:
            yield
        except UnrelatedBases:
            raise  # the verdict, when all is done
        except BaseException:
            self._models.clear()
            raise
        finally:
            if self.is_temporary and self._checkpoints is not None:
                self._checkpoints.remove_own_parts()


@contextlib.contextmanager
def share_parts(
    resume: str | PathLike[str] | None, folder: Path, several: bool
) -> Iterator[CommonParts]:
    """Yields the shared parts of fits, while they go on."""
    if resume is not None or not several:
        yield CommonParts(resume)
        return
    parts = folder / PARTS  # what a killed run has left there goes on
    try:
        yield CommonParts(parts, is_temporary=True)
    finally:
        shutil.rmtree(parts, ignore_errors=True)
