"""Models of two experts, for high and low noise: Wan 2.2.

A LoRA of such a model is two files, one for each expert, or one file for both.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from ..errors import UnsupportedFormat
from ..files.hub import spell_path
from .base import Base
from .folder import find_expert_folders
from .opening import BaseLike, open_base, open_pair

HIGH, LOW = "high_noise", "low_noise"
"""The experts, as file names call them; the one for high noise comes first, as it does in use."""

ExpertsLike = BaseLike | Sequence[BaseLike]
"""A base, or a model of two experts: the folder of its pipeline, or (high noise, low noise)."""

Experts = dict[str, Base]
"""{`HIGH`: base, `LOW`: base}, or {"": base} for a model without experts."""

# "low_angle" or "high_res" in a file's name says nothing of noise; "HIGH" in capitals does, and so
# does the last word.
_WITH_NOISE = re.compile(r"(?<![a-z])(high|low)[-_ .]?noise(?![a-z])", re.IGNORECASE)
_IN_CAPITALS = re.compile(r"(?<![A-Za-z])(HIGH|LOW)(?![A-Za-z])")
_LAST_WORD = re.compile(r"(?<![a-z])(high|low)$", re.IGNORECASE)
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_SUFFIXES = (".safetensors", ".gguf")


@dataclass(frozen=True, eq=False)
class ExpertPair:
    """A source and a target that a LoRA is moved between."""

    expert: str  # `HIGH` or `LOW`; "" where neither is a model of two experts
    source: Base  # the base, or its expert
    target: Base  # the base, or its expert
    serves_any: bool  # also moves LoRAs whose names tell no expert


def find_expert(name: str) -> str | None:
    """Returns the expert in a file's or folder's name: `HIGH`, `LOW` or None."""
    stem = next((name.removesuffix(s) for s in _SUFFIXES if name.endswith(s)), name)
    spaced = _CAMEL.sub("_", stem)
    for pattern in (_WITH_NOISE, _IN_CAPITALS, _LAST_WORD):
        words = {match[1].lower() for match in pattern.finditer(spaced)}
        if words:
            return f"{words.pop()}_noise" if len(words) == 1 else None
    return None


def open_experts(source: ExpertsLike | Experts) -> Experts:
    """Opens a model that may have two experts; only headers are read.

    Args:
        source: whatever `open_base` takes; the folder of a pipeline with two transformers, or such
            a pipeline; or (high noise, low noise), each as `open_base` takes it. The names of files
            and folders tell the experts apart, whatever the order. What this function returned is
            returned.

    Returns:
        {"high_noise": base, "low_noise": base}, or {"": base} for a model without experts.

    Raises:
        UnsupportedFormat: names that do not tell the experts, or more than two bases.
        ProLoRAError: see `open_base`.
    """
    if isinstance(source, Mapping) and isinstance(next(iter(source.values()), None), Base):
        return cast(Experts, source)
    if isinstance(source, Sequence) and not isinstance(source, str):
        return _open_listed(source)
    if isinstance(source, str | os.PathLike) and (folders := find_expert_folders(Path(source))):
        name = Path(source).resolve().name
        return {
            expert: replace(open_base(folder), name=f"{name}/{folder.name}")
            for expert, folder in zip((HIGH, LOW), folders, strict=True)
        }
    if not isinstance(source, Mapping | torch.nn.Module | Base):
        models: list[Any] = [
            getattr(source, part, None) for part in ("transformer", "transformer_2")
        ]
        if all(isinstance(model, torch.nn.Module) for model in models):
            high, low = models
            return {HIGH: open_base(high), LOW: open_base(low)}
    return {"": open_base(cast(BaseLike, source))}


def _open_listed(sources: Sequence[BaseLike]) -> Experts:
    """Opens one base, or two that are experts of one model."""
    if len(sources) == 1:
        return open_experts(sources[0])
    if len(sources) != 2:
        raise UnsupportedFormat(
            f"a model is one base, or two experts (high noise, low noise), not {len(sources)} bases"
        )
    named = [_find_expert_of_path(source) for source in sources]
    if not any(isinstance(source, str | os.PathLike) for source in sources):
        named = [HIGH, LOW]
    if set(named) != {HIGH, LOW}:
        names = " and ".join(map(_name_source, sources))
        raise UnsupportedFormat(
            f"{names}: two bases are the experts of one model, for high noise and for low noise, "
            'but their names do not tell which is which; put "high_noise" and "low_noise" into them'
        )
    bases = {str(name): open_base(source) for name, source in zip(named, sources, strict=True)}
    return {HIGH: bases[HIGH], LOW: bases[LOW]}


def _find_expert_of_path(source: BaseLike) -> str | None:
    """Returns the expert by the name of a file or folder, else its parent's."""
    if isinstance(source, Base):
        return find_expert(source.name)
    if not isinstance(source, str | os.PathLike):
        return None
    path = Path(source)
    parts = find_expert_folders(path.parent)
    if parts and path.name in (part.name for part in parts):
        return (HIGH, LOW)[[part.name for part in parts].index(path.name)]
    return find_expert(path.name) or find_expert(path.parent.name)


def _name_source(source: BaseLike) -> str:
    if isinstance(source, Base):
        return source.name
    return os.fspath(source) if isinstance(source, str | os.PathLike) else type(source).__name__


def pair_experts(sources: Experts, targets: Experts) -> list[ExpertPair]:
    """Pairs the experts of source and target; a base without experts serves both."""
    old, new = next(iter(sources.values())), next(iter(targets.values()))
    return [
        ExpertPair(
            expert,
            *open_pair(sources.get(expert, old), targets.get(expert, new)),
            serves_any=expert in targets,
        )
        for expert in (targets if len(targets) > 1 else sources)
    ]


def choose_pairs(lora: Path, pairs: Sequence[ExpertPair]) -> list[tuple[ExpertPair, str]]:
    """Returns the bases a LoRA is moved between, with suffixes for its results' names.

    A LoRA whose name tells an expert is moved to that expert alone; any other to both.

    Raises:
        UnsupportedFormat: the source alone has experts, and the name does not tell one.
    """
    if len(pairs) == 1:
        return [(pairs[0], "")]
    expert = find_expert(lora.name)
    if expert is not None:
        return [(pair, "") for pair in pairs if pair.expert == expert]
    if not all(pair.serves_any for pair in pairs):
        raise UnsupportedFormat(
            f"{spell_path(lora)}: the source has two experts, for high noise and for low noise, "
            "and the LoRA's "
            'name tells neither; give one of them as `source`, or put "high_noise" or "low_noise" '
            "into the name"
        )
    return [(pair, f"_{pair.expert}") for pair in pairs]
