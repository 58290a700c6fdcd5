"""Whether pipelines denoise the same latents, or images can cross between them: from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..architectures.modules import find_block
from ..errors import UnsupportedFormat
from .folder import MODELS, open_folder_weights
from .pipeline_files import is_pipeline, read_component_config

_DEFAULTS: dict[str, Any] = {
    "latent_channels": 4,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}
RUN_INSTEAD = "`fit()` runs the models instead, and may move the LoRA"
"""What errors say where `can_fit` holds."""
MIN_COSINE = 0.9
"""Of two VAEs' encoders: fine-tunes and copies have 1, VAEs trained apart far less."""


def explain_vae_difference(source: Path, target: Path) -> str | None:
    """Explains why the latents of two pipeline folders differ, from their configurations.

    A latent means something only to the VAE it belongs to: where the VAEs differ, one model's
    latents are noise to the other, and no question can be asked of both. None where nothing speaks
    against it; `explain_different_latents` looks at the weights as well.
    """
    left, right = (_read_configuration(folder) for folder in (source, target))
    if left is None and right is None:
        return None  # both denoise pixels
    if left is None or right is None:
        return "one of them denoises pixels and the other a VAE's latents"
    different = [key for key in left if left[key] != right[key]]
    if not different:
        return None
    facts = ", ".join(
        key
        if isinstance(left[key] or right[key], list)
        else f"{key} {left[key]} against {right[key]}"
        for key in different
    )
    return f"their VAEs differ ({facts}), so a latent of one means nothing to the other"


def can_fit(source: Path | None, target: Path | None) -> bool:
    """Returns whether files allow a fit between two bases.

    Both must be whole pipelines whose denoisers have linear layers in blocks, with the same latents
    or with a way from latents to images and back. Whether the result would be any good is known
    only after sampling.
    """
    if source is None or target is None or not (is_pipeline(source) and is_pipeline(target)):
        return False
    try:
        if explain_vae_difference(source, target) is not None:
            check_images_cross(source, target)
        return all(_has_fitted_blocks(folder) for folder in (source, target))
    except UnsupportedFormat:
        return False


def _has_fitted_blocks(folder: Path) -> bool:
    part = next((part for part in MODELS if (folder / part).is_dir()), None)
    if part is None:
        return False
    weights = open_folder_weights(folder / part)
    return any(
        len(weight.shape) == 2 and find_block(key.removesuffix(".weight"))
        for key, weight in weights.items()
        if key.endswith(".weight")
    )


def check_images_cross(source: Path, target: Path) -> None:
    """Refuses pipelines with different latents between which no image could cross.

    Files alone decide.

    Raises:
        UnsupportedFormat: one has no VAE and denoises no pixels, or a VAE without an encoder.
    """
    for folder in (source, target):
        if not (folder / "vae").is_dir():
            if _read_denoiser_config(folder).get("in_channels", 3) != 3:
                raise UnsupportedFormat(
                    f"{folder}: the pipeline has no VAE, and its latents are not pixels, so no "
                    "image can cross to another model's latents"
                )
        elif not any(key.startswith("encoder.") for key in open_folder_weights(folder / "vae")):
            raise UnsupportedFormat(
                f"{folder / 'vae'}: the VAE has no encoder, so no image can cross to its latents"
            )


def _read_denoiser_config(folder: Path) -> dict[str, Any]:
    """Reads the configuration of a pipeline's UNet or transformer; empty without one."""
    for part in MODELS:
        if (folder / part / "config.json").is_file():
            return read_component_config(folder / part)
    return {}


def explain_different_latents(source: Path, target: Path) -> str | None:
    """Explains why the latents of two pipeline folders differ; None for one space.

    Raises:
        UnsupportedFormat: a VAE without readable safetensors.
    """
    reason = explain_vae_difference(source, target)
    if reason is None and _read_configuration(source) is not None:
        cosine = _compare_encoders(source / "vae", target / "vae")
        if cosine < MIN_COSINE:
            reason = (
                f"their VAEs' encoders were trained apart (cosine {cosine:.2f}, at least "
                f"{MIN_COSINE} is asked for), so a latent of one means nothing to the other"
            )
    return reason


def _read_configuration(folder: Path) -> dict[str, Any] | None:
    """Reads what fixes a latent space; None for pipelines without a VAE."""
    if not (folder / "vae").is_dir():
        return None
    configuration = read_component_config(folder / "vae")
    space = {key: configuration.get(key, default) for key, default in _DEFAULTS.items()}
    space["shift_factor"] = space["shift_factor"] or 0.0
    blocks = configuration.get("block_out_channels")
    space["downsampling"] = 2 ** (len(blocks) - 1) if isinstance(blocks, list) else None
    return space


def _compare_encoders(source: Path, target: Path) -> float:
    """Returns ⟨a, b⟩/(‖a‖‖b‖) over two encoders' matrices; 0 if none fit."""
    left, right = (open_folder_weights(folder) for folder in (source, target))
    dot = norm_a = norm_b = 0.0
    for key, weight in left.items():
        other = right.get(key)
        if not key.startswith("encoder.") or len(weight.shape) < 2:
            continue
        if other is None or other.shape != weight.shape:
            return 0.0
        a, b = (w.read().to(torch.float32).flatten() for w in (weight, other))
        dot += float(a @ b)
        norm_a += float(a @ a)
        norm_b += float(b @ b)
    return dot / (norm_a * norm_b) ** 0.5 if norm_a and norm_b else 0.0
