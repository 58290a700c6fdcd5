"""The guidance that a source of the study is asked with, where a target runs without any."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from worlds import World

from prolora.probe import Call, Guidance
from prolora.probe.pipelines.conditioning import build_call, split_call


def guide_source(world: World, source: nn.Module, kind: str, adapter: str) -> Guidance | None:
    """The guidance that the source is asked with, where the target of that kind runs without.

    With a few-step adapter the source runs without, too.
    """
    if kind not in world.distilled:
        return None
    with torch.no_grad():
        null = world.tokens(source, torch.tensor([world.null_prompt]))

    def without_prompt(call: Call) -> Call:
        parts = split_call(source, call)
        tokens = null.expand(len(parts.latent), *null.shape[1:])
        return build_call(source, replace(parts, conditioning={("tokens",): tokens}))

    def keep_prompted(call: Call) -> Call | None:
        tokens = split_call(source, call).conditioning["tokens",]
        rows = (tokens != null).flatten(1).any(1)
        if not rows.any():
            return None
        return replace(call, args=tuple(part[rows] for part in call.args))

    return Guidance(world.guidance, without_prompt, keep_prompted, adapter != "fewstep")
