"""The part of a LoRA in a pipeline's text encoders.

It runs beside their weights while prompts are encoded. The source is asked with it, so that what it
changes is fitted into the target's blocks, whatever text encoder the target has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ...core.lowrank import LowRank
from ...errors import ProLoRAError
from ..checkpoint import hash_updates
from ..recording.trajectories import Sample
from ..settings import FitSettings
from ..updates import run_beside
from .conditioning import PromptTable
from .pipeline import Pipeline

_INNER = "text_model."
"""What the module names of CLIP's text models start with in files, and no longer in memory."""


@contextlib.contextmanager
def run_text_encoders_beside(pipeline: Pipeline, updates: Mapping[str, LowRank]) -> Iterator[None]:
    """Runs a pipeline's text encoders with updates beside their weights.

    The names of the updates begin with the text encoder's.
    """
    by_encoder: dict[str, dict[str, LowRank]] = {}
    for name, update in updates.items():
        part, _, inner = name.partition(".")
        encoder = getattr(pipeline.pipe, part, None)
        if encoder is None:
            raise ProLoRAError(f"{pipeline.name}: it has no {part}, which the LoRA has {name} of")
        modules = dict(encoder.named_modules())
        known = inner if inner in modules else inner.removeprefix(_INNER)
        by_encoder.setdefault(part, {})[known] = update

    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for part, found in by_encoder.items():
                stack.enter_context(run_beside(getattr(pipeline.pipe, part), found))
            yield

    memory = pipeline.memory if updates else None
    with enter() if memory is None else memory.under(hash_updates(updates), enter):
        yield


@dataclass(frozen=True)
class TextPart:
    """Updates of the source's text encoders, and their effect on prompts."""

    pipeline: Pipeline  # the source
    updates: Mapping[str, LowRank]  # by names that begin with the text encoder's
    table: PromptTable  # its conditioning for each prompt with the updates in place

    @classmethod
    def of(
        cls, pipeline: Pipeline, updates: Mapping[str, LowRank], settings: FitSettings
    ) -> TextPart | None:
        """Encodes the prompts with the updates in place; None without updates."""
        if not updates:
            return None
        with run_text_encoders_beside(pipeline, updates):
            return cls(pipeline, updates, pipeline.tabulate_prompts(settings))

    def sampler(self, settings: FitSettings, on_image: Callable[[], None] | None = None) -> Sample:
        """Runs `Pipeline.sampler` with the updates in place."""
        run = self.pipeline.sampler(settings, on_image)

        def sample(seed: int) -> None:
            with run_text_encoders_beside(self.pipeline, self.updates):
                run(seed)

        return sample
