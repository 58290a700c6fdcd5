"""The models and LoRAs that examples/icon_family ships, as a world reads them."""

from __future__ import annotations

import functools

import torch
from prolora_icon_family import IconPipeline
from torch import Tensor, nn

from prolora import LowRank
from prolora.adapters import read_adapter
from prolora.cli.demo import find_models

from .networks import Painter
from .words import NULL_PROMPT, VOCABULARY, all_prompts, word_ids


class ShippedPainter(Painter):
    """A member of the family; a table of what the text encoder said stands for the encoder."""

    def __init__(self, kind: str) -> None:
        super().__init__("flux", kind)
        self.backbone = IconPipeline.from_pretrained(find_models() / kind).transformer.float()
        self.text_encoder = None

    def encode(self, y: Tensor) -> Tensor:
        """(n,) prompts -> tokens (n, 4, 64)."""
        return token_table()[y]


def load_model(kind: str) -> nn.Module:
    """A base in evaluation mode: "source", "pruned", "far" or "few-step"."""
    return ShippedPainter(kind).eval().requires_grad_(False)


def load_lora(adapter: str) -> dict[str, LowRank]:
    """{module: update} of a LoRA of the source: "neon", "duotone" or "concept"."""
    return read_adapter(find_models() / f"loras/{adapter}.safetensors").updates


@functools.cache
def token_table() -> Tensor:
    """[1 + prompts, 4, 64]: tokens by the number of the prompt, NaN where there is no picture."""
    y = all_prompts()
    prompts = [" ".join(VOCABULARY[word] for word in ids) for ids in word_ids(y).tolist()]
    pipe = IconPipeline.from_pretrained(find_models() / "source")
    null, *tokens = pipe.encode_icons(["", *prompts])
    table = torch.full((NULL_PROMPT + 1, *null.shape), torch.nan)
    table[NULL_PROMPT], table[y] = null, torch.stack(tokens)
    return table
