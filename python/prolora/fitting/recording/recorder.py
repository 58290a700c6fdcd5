"""The questions of a probing: recorded while the models sample, or read back from a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ...adapters.adapter import Adapter
from ...core.lowrank import LowRank
from ..checkpoint import Checkpoints, hash_texts, hash_updates
from ..updates import run_beside
from .trajectories import Call, Sample, decode_calls, encode_calls, record_calls
from .translation import Question, Translation

ORIGINS = ("source", "adapted", "target")
"""Whose trajectories are recorded: the source's, the source's with its LoRA, the target's."""


@dataclass(frozen=True)
class Recorder:
    """Sampler runs of source, source with its LoRA, and target."""

    source: nn.Module  # the source model
    target: nn.Module  # the target model
    adapter: Adapter  # the LoRA of the source
    samplers: tuple[Sample, Sample, Sample]  # one for each of ORIGINS
    translation: Translation  # turns each recorded call into a question to both models
    # Where recorded calls are kept
    checkpoints: Checkpoints = field(default_factory=lambda: Checkpoints(None))
    # Origin -> hash of what its trajectories depend on, besides the seed and the models
    keys: Mapping[str, str] = field(default_factory=lambda: hash_origins({}, ""))

    @property
    def key(self) -> str:
        """Hash of what all trajectories together depend on."""
        return hash_texts(*self.keys.values())

    @property
    def crossed(self) -> int:
        """No images cross: both models take the same latents."""
        return 0

    def record_questions(self, seed: int, held_out: bool = False) -> list[Question]:
        """Records the questions of all three trajectories.

        Their seeds are `seed` and the next two.
        """
        del held_out  # both kinds are recorded alike
        models = self.source, self.source, self.target
        calls: list[Call] = []
        for i, (origin, model) in enumerate(zip(ORIGINS, models, strict=True)):
            calls += self._load_or_record(origin, model, self.samplers[i], seed + i)
        return [self.translation.question(c) for c in self.translation.keep_prompted(calls)]

    def _load_or_record(
        self, origin: str, model: nn.Module, sample: Sample, seed: int
    ) -> list[Call]:
        """Loads the calls of an origin that were kept, or records and keeps them."""
        name, key = f"calls-{origin}-{seed}", hash_texts(self.keys[origin], str(seed))
        kept = self.checkpoints.recall(name, key)
        if kept is not None:
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
            tensors, text = kept
            return decode_calls([tensors[str(i)].to(device) for i in range(len(tensors))], text)
        with run_beside(model, self.adapter.updates if origin == "adapted" else {}):
            calls = record_calls(model, sample, seed, origin)
        if origin == "adapted":
            calls = [self.translation.unadapt(call) for call in calls]
        if self.checkpoints.folder is not None:
            encoded, text = encode_calls(calls)
            self.checkpoints.store(name, key, {str(i): t for i, t in enumerate(encoded)}, text)
        return calls


def hash_origins(updates: Mapping[str, LowRank], samplers_text: str) -> dict[str, str]:
    """Returns origin -> hash of what its samplings depend on; "" where nothing is kept.

    `samplers_text` says what the samplers do, and `updates` are what the LoRA is sampled with.
    """
    if not samplers_text:
        return dict.fromkeys(ORIGINS, "")
    plain = hash_texts(samplers_text)
    adapted = hash_texts(samplers_text, hash_updates(updates))
    return {"source": plain, "adapted": adapted, "target": plain}
