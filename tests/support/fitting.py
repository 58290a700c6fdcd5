"""A fit between models at hand, its samplers, translation and settings by keyword."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from prolora import fitting as probe


def fit_models(
    source: nn.Module,
    target: nn.Module,
    lora: Any,
    sample_source: Any,
    sample_target: Any,
    sample_adapted: Any = None,
    *,
    described: str = "",
    rival: Mapping[str, Any] | None = None,
    **options: Any,
) -> probe.ProbeTransfer:
    """`probe.fit_to_models`; `options` are fields of `Translation` and of `FitSettings`."""
    names = {known.name for known in fields(probe.Translation)} & options.keys()
    translation = probe.Translation(**{name: options.pop(name) for name in names})
    return probe.fit_to_models(
        source,
        target,
        lora,
        probe.Samplers(sample_source, sample_target, sample_adapted, described),
        probe.FitSettings(**options),
        translation=translation,
        rival=rival,
    )
