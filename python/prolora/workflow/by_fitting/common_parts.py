"""What the fits of several LoRAs between the same two pipelines have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ...bases import Base
from ...bases.pipeline_identity import describe_pipeline_folder
from ...core.validation import DeviceLike
from ...errors import OutputError, UnrelatedBases
from ...files.atomic import temporary_folder

if TYPE_CHECKING:
    from ...probe.checkpoint import Checkpoints, Inputs
    from ...probe.pipelines import Pipeline

T = TypeVar("T")
SIDES = ("source", "target")


class CommonParts:
    """The opened pipelines and a folder of kept results, of one LoRA or of several in turn.

    Attributes:
        folder: where results are kept; None keeps nothing.
        is_temporary: whether nobody asked for the folder. Then parts that the next LoRA cannot use
            are removed from it, and a fit goes on without it where it cannot be written.
    """

    def __init__(self, folder: str | PathLike[str] | None, is_temporary: bool = False) -> None:
        """Takes the folder; opens nothing."""
        self.folder = None if folder is None else Path(folder)
        self.is_temporary = is_temporary
        self._files: Inputs | None = None
        self._models: dict[str, Pipeline] = {}
        self._asked: object = None
        self._checkpoints: Checkpoints | None = None

    def check_folder(self, source: Base, target: Base) -> None:
        """Refuses a folder of results that were made from other files, before a model is loaded.

        Raises:
            OutputError: see `check_inputs`.
        """
        from ...probe.checkpoint import check_inputs

        if self.folder is None or self._files is not None:
            return
        assert source.path is not None and target.path is not None
        folder, paths = self.folder, (source.path, target.path)
        files = {
            f"the {side}: files": describe_pipeline_folder(path)
            for side, path in zip(SIDES, paths, strict=True)
        }
        self._open_folder(lambda: check_inputs(folder, files))
        self._files = files

    def open_checkpoints(self) -> Checkpoints:
        """The kept results, once both pipelines were opened.

        Raises:
            OutputError: see `check_inputs`.
        """
        from ...probe.checkpoint import open_checkpoints

        if self._checkpoints is None:
            models = [self._models[side] for side in SIDES]
            inputs = dict(self._files or {})
            if self.folder is not None:
                inputs |= {
                    f"the {side}: parts": model.parts
                    for side, model in zip(SIDES, models, strict=True)
                }
            denoisers = models[0].denoiser, models[1].denoiser
            self._checkpoints = self._open_folder(
                lambda: open_checkpoints(self.folder, *denoisers, inputs, self.is_temporary)
            )
        return self._checkpoints

    def _open_folder(self, check: Callable[[], T]) -> T:
        """What a check of the folder gives; a temporary one of other inputs is emptied."""
        try:
            return check()
        except OutputError:
            if not self.is_temporary or self.folder is None:
                raise
        for entry in self.folder.iterdir():
            entry.unlink()
        return check()

    def make_room(self, asked: object, all_of_it: bool) -> None:
        """Frees what is left of the fit before, so that this one needs no more than the first.

        The target stays where no text encoder has to be read beside it.

        Args:
            asked: the prompts and what runs in the text encoders.
            all_of_it: whether the target goes in any case.
        """
        for side, model in self._models.items():
            stays = side == "target" and asked == self._asked and not all_of_it
            model.release(keep_denoiser=stays)
        self._asked = asked

    def forget_models(self) -> None:
        """Lets the pipelines go; the next fit loads them anew."""
        self._models.clear()

    def open(self, side: str, folder: Path, device: DeviceLike) -> Pipeline:
        """A pipeline: loaded, or as the fit before left it (see `Pipeline.restore`)."""
        from ...probe import pipelines

        if side not in self._models:
            model = self._models[side] = pipelines.open_pipeline(folder, device)
            if self.folder is not None:
                model.parts  # noqa: B018 (read while the text encoders are there)
        return self._models[side]

    @contextlib.contextmanager
    def one_fit(self) -> Iterator[None]:
        """Around the fit of each LoRA: clears up after it.

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
    """What fits have in common, while they go on.

    Args:
        resume: the folder that was asked for.
        folder: of the results, in which a temporary one stands where none was asked for.
        several: whether there is more than one LoRA.
    """
    from ...probe.checkpoint import INPUTS_FILE

    with contextlib.ExitStack() as stack:
        kept = resume
        if resume is None and several:
            with contextlib.suppress(OSError):
                kept = stack.enter_context(temporary_folder(folder, INPUTS_FILE))
        yield CommonParts(kept, is_temporary=kept is not resume)
