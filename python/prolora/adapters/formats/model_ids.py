"""Trainers' names of a model in headers, by which managers sort."""

from __future__ import annotations

from typing import NamedTuple

SPECIFICATION = "1.0.1"
"""The version of `modelspec.*` whose keys these are (Stability-AI/ModelSpec)."""


class ModelIds(NamedTuple):
    """The ids of a model; None where no trainer was found to write one."""

    version: str | None = None  # kohya's `ss_base_model_version`
    architecture: str | None = None  # `modelspec.architecture`, without the "/lora" of an adapter


_SD1 = ModelIds("sd_v1", "stable-diffusion-v1")
# SSD-1B, Vega and KOALA have no id of their own; user interfaces list their LoRAs with SDXL's.
_SDXL = ModelIds("sdxl_base_v1-0", "stable-diffusion-xl-v1-base")
_FLUX_DEV = ModelIds("flux1", "flux-1-dev")
_HUNYUAN_VIDEO = ModelIds("hunyuan_video", "hunyuan-video")
_HUNYUAN_VIDEO_15 = ModelIds("hunyuan_video_1_5", "hunyuan-video-1.5")
_KANDINSKY = ModelIds("kandinsky5", "Kandinsky-5")
# Layout -> ids, as sd-scripts writes them (library/sai_model_spec.py), or musubi-tuner
# (utils/sai_model_spec.py, dataset/architectures.py) for videos and what it alone trains.
_LAYOUTS = {
    "sd15": _SD1,
    "sd21": ModelIds("sd_v2", "stable-diffusion-v2-512"),
    "sdxl": _SDXL,
    "ssd-1b": _SDXL,
    "segmind-vega": _SDXL,
    "sd3-medium": ModelIds(None, "stable-diffusion-3-m"),
    "sd3.5-medium": ModelIds(None, "stable-diffusion-3-5-medium"),
    "sd3.5-large": ModelIds(None, "stable-diffusion-3-5-large"),
    "flux1-dev": _FLUX_DEV,
    "flux1-fill": _FLUX_DEV,
    "flux1-schnell": ModelIds("flux1", "flux-1-schnell"),
    "flux2-dev": ModelIds("flux_2_dev", "Flux.2-dev"),
    "flux2-klein-4b": ModelIds("flux_2_klein_4b", "Flux.2-klein-4b"),
    "flux2-klein-9b": ModelIds("flux_2_klein_9b", "Flux.2-klein-9b"),
    "chroma": ModelIds(None, "chroma"),
    "lumina2": ModelIds(None, "lumina-2"),
    "hunyuan-image": ModelIds(None, "hunyuan-image-2.1"),
    "hunyuan-image-distilled": ModelIds(None, "hunyuan-image-2.1"),
    "hunyuan-video": _HUNYUAN_VIDEO,
    "hunyuan-video-i2v-33": _HUNYUAN_VIDEO,
    "framepack": ModelIds("framepack", "framepack"),
    "hunyuan-video-1.5": _HUNYUAN_VIDEO_15,
    "hunyuan-video-1.5-step-distilled": _HUNYUAN_VIDEO_15,
    "kandinsky5-lite": _KANDINSKY,
    "kandinsky5-pro": _KANDINSKY,
    "qwen-image": ModelIds("qwen_image", "Qwen-Image"),
    "z-image": ModelIds("z_image", "Z-Image"),
    "krea2": ModelIds("krea2"),
    "ideogram4": ModelIds("ideogram4"),
    "minimax-h3": ModelIds("minimax_h3"),
}
# Beginning of a layout's id -> ids of all its sizes.
_SIZES = {
    "bk-sdm-": _SD1,
    "koala-": _SDXL,
    "anima": ModelIds(None, "anima-preview"),
    "wan": ModelIds("wan", "wan2.1"),
}


def find_ids(layout: str | None) -> ModelIds:
    """Returns the ids of a layout (an id of `architectures.layouts`), None if unknown."""
    if layout is None:
        return ModelIds()
    of_sizes = (ids for start, ids in _SIZES.items() if layout.startswith(start))
    return _LAYOUTS.get(layout) or next(of_sizes, ModelIds())
