"""What the JSON files of a diffusers pipeline folder say: kinds checked, sizes bounded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedFormat
from ..files.jsontext import read_json_object
from .folder import MODELS

if TYPE_CHECKING:
    from .base import Base

PIPELINE_INDEX = "model_index.json"
UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of pipelines that never run when latents are sampled from a prompt."""

FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler", "SCMScheduler")
"""Schedulers of few-step models."""

FEW_STEP_LAYOUTS = (
    *("flux1-schnell", "flux3-klein-distilled", "hunyuan-video-1.5-step-distilled"),
    *("sana-sprint-0.6b", "sana-sprint-1.6b"),
)
"""Published sizes that only few-step models have."""

FEW_STEP_NAMES = frozenset(("turbo", "lightning", "schnell", "lcm", "hyper", "sprint", "dmd2"))
"""Words in the names of few-step models; a name is no proof."""

_FEW_STEPS = re.compile(r"(?<![0-9])(few|[1-8])[-_ ]?steps?\b", re.IGNORECASE)

MOST_FEW_STEPS = 10
"""Models that draw in at most so many steps were distilled to it."""

_GUIDANCE_EMBEDDING = "time_embedding.cond_proj.weight"  # in UNets that learnt their guidance
_MOST_BYTES = 1 << 20  # real ones have a few thousand
_MOST = 1 << 20  # no width, size or number of layers is larger
_COUNTS = (
    *("in_channels", "out_channels", "latent_channels", "sample_size", "block_out_channels"),
    *("layers_per_block", "num_layers", "norm_num_groups", "cross_attention_dim"),
    *("attention_head_dim", "num_attention_heads"),
)
_NUMBERS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


@dataclass(frozen=True)
class PipelineIndex:
    """A model_index.json."""

    class_name: str  # of the pipeline, as diffusers calls it
    parts: Mapping[str, tuple[str, str]]  # name -> (library, class) of the pipeline's parts
    content: Mapping[str, Any]  # all of the file

    @property
    def denoiser(self) -> str | None:
        """The name of its UNet or transformer; None without one."""
        return next((part for part in MODELS if part in self.parts), None)


def is_pipeline(folder: str | Path | None) -> bool:
    """Returns whether a path is the folder of a whole diffusers pipeline."""
    return folder is not None and os.path.isfile(os.path.join(folder, PIPELINE_INDEX))


def read_pipeline_index(folder: Path) -> PipelineIndex:
    """Reads the model_index.json of a pipeline folder.

    Raises:
        UnsupportedFormat: it is missing, damaged or too large, names no class, or has a part that
            is no pair of library and class, or whose name is no name of a folder.
    """
    file = folder / PIPELINE_INDEX
    content = read_json_object(file, _MOST_BYTES)
    class_name = content.get("_class_name")
    if not isinstance(class_name, str) or not _is_name(class_name):
        raise UnsupportedFormat(f"{file}: names no class of diffusers as _class_name")
    parts = {}
    for name, value in content.items():
        if not _is_name(name) or value is None or value == [None, None]:
            continue
        if isinstance(value, list) and len(value) == 2 and all(map(_is_name, value)):
            parts[name] = (value[0], value[1])
        elif name in (*MODELS, "vae", "scheduler") or (folder / name).is_dir():
            raise UnsupportedFormat(
                f"{file}: {name} must be a pair of a library and a class, not {_shorten(value)}"
            )
    return PipelineIndex(class_name, parts, content)


def draws_in_few_steps(base: Base, steps: int | None = None) -> bool | None:
    """Returns whether a model draws in few steps; None where nothing shows it.

    `steps` decides; else the layout, an embedding of the guidance scale, or the scheduler of a
    pipeline folder. Flow schedulers are the same for both kinds, and most single files have none.
    """
    if steps is not None:
        return steps <= MOST_FEW_STEPS
    if base.layout in FEW_STEP_LAYOUTS:
        return True
    if any(key.endswith(_GUIDANCE_EMBEDDING) for key in base.stored):
        return True
    if base.path is None or not is_pipeline(base.path):
        return None
    try:
        _, scheduler = read_pipeline_index(base.path).parts.get("scheduler", ("", ""))
        file = base.path / "scheduler" / "scheduler_config.json"
        config = read_json_object(file, _MOST_BYTES) if file.is_file() else {}
    except UnsupportedFormat:  # a damaged one
        return None
    return is_few_step_scheduler(scheduler, config)


def is_few_step_scheduler(name: str, config: Mapping[str, Any]) -> bool | None:
    """Returns whether a scheduler samples in few steps; None where it serves both kinds."""
    if name in FEW_STEP_SCHEDULERS:
        return True
    if config.get("timestep_spacing") == "trailing":  # of distilled models, and of some others
        return True if name == "EulerAncestralDiscreteScheduler" else None
    return None if not name or "Flow" in name else False


def is_named_few_step(base: Base) -> bool:
    """Returns whether a model's names have a word of few-step models."""
    names = [base.name]
    with suppress(UnsupportedFormat):
        if base.path is not None and is_pipeline(base.path):
            index = read_pipeline_index(base.path)
            file = base.path / (index.denoiser or "") / "config.json"
            config = read_json_object(file, _MOST_BYTES) if file.is_file() else {}
            names += [str(x.get("_name_or_path", "")) for x in (index.content, config)]
            names.append(index.class_name)
    text = " ".join(names)
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+[0-9]*", text)
    return bool(_FEW_STEPS.search(text)) or not FEW_STEP_NAMES.isdisjoint(map(str.lower, words))


def _is_name(value: object) -> bool:
    """Returns whether a value could name a part, a library or a class."""
    if not isinstance(value, str) or not value.isascii() or len(value) > 100:
        return False
    return all(word.isidentifier() for word in value.split("."))


def read_component_config(folder: Path) -> dict[str, Any]:
    """Reads the config.json of a pipeline's UNet, transformer or VAE.

    Raises:
        UnsupportedFormat: it is missing, damaged or too large, or a number in it that a model is
            built by is of another kind or beyond all bounds.
    """
    file = folder / "config.json"
    config = read_json_object(file, _MOST_BYTES)
    for names, check, what in (
        (_COUNTS, _is_count, f"a whole number of at most {_MOST}, or a list of such"),
        (_NUMBERS, _is_finite, "a finite number, or a list of such"),
    ):
        for name in names:
            value = config.get(name)
            items = _flatten(value) if isinstance(value, list) else [value]
            if value is not None and not all(check(item) for item in items):
                raise UnsupportedFormat(f"{file}: {name} must be {what}, not {_shorten(value)}")
    return config


def _flatten(values: list[Any]) -> list[Any]:
    """Flattens lists in lists, two levels down: layers of blocks of blocks."""
    for _ in range(2):
        values = [i for v in values for i in (v if isinstance(v, list) else [v])]
    return values


def _is_count(value: object) -> bool:
    return value is None or (type(value) is int and 0 <= value <= _MOST)


def _is_finite(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and -1e30 < value < 1e30)


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
