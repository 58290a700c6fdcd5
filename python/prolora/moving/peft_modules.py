"""The configuration of a PEFT adapter that is still in its model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from ..core.arrays import to_tensor
from ..verbs.options import LoraLike

_PREFIX = "base_model.model."


def add_peft_config(lora: LoraLike, source: object) -> LoraLike:
    """Adds the configuration that the source holds to a state dict of its adapter.

    `peft.get_peft_model_state_dict(model)` has no alpha: that is in `model.peft_config`. Warns of a
    state dict in PEFT's names whose configuration is not there either.

    Args:
        lora: any LoRA; only a state dict of low-rank factors without alphas is changed.
        source: the base that it was trained on; a module or a pipeline may have the adapter.

    Returns:
        (state dict, configuration) for an adapter of the source, else `lora`.
    """
    if not isinstance(lora, Mapping) or any(str(key).endswith(".alpha") for key in lora):
        return lora
    ups = [key for key in lora if str(key).endswith((".lora_B.weight", ".lora_B"))]
    if not ups:
        return lora
    up = to_tensor(lora[ups[0]], ups[0])
    models: list[Any] = [source, *(getattr(source, p, None) for p in ("unet", "transformer"))]
    for model in models:
        for name, config in (getattr(model, "peft_config", None) or {}).items():
            if isinstance(model, torch.nn.Module) and _has_factor(model, name, up):
                return lora, config
    if all(key.startswith(_PREFIX) for key in lora):
        message = (
            "this state dict of PEFT has no alpha, and is read at scale 1; give "
            "(state dict, model.peft_config['default']) where it was trained with another"
        )
        warnings.warn(message, stacklevel=4)
    return lora


def _has_factor(model: torch.nn.Module, adapter: str, up: torch.Tensor) -> bool:
    """Returns whether a matrix is one of an adapter's up factors."""
    return any(
        parameter.shape == up.shape and torch.equal(parameter.detach().cpu(), up.detach().cpu())
        for name, parameter in model.named_parameters()
        if name.endswith(f".lora_B.{adapter}.weight")
    )
