"""Prompts of four words, and the text encoder that reads them.

A prompt is one number, so that the study treats it like a digit's label.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .catalogue import CONCEPT, GROUNDS, INKS, SETS, WORDS

WHAT, STYLE, INK, GROUND = list(WORDS), list(SETS), list(INKS), list(GROUNDS)
VOCABULARY = ["nothing", *WHAT, *STYLE, *INK, *(f"on-{colour}" for colour in GROUND)]
LENGTH, WIDTH = 4, 64
PROMPTS = len(WHAT) * len(STYLE) * len(INK) * len(GROUND)
NULL_PROMPT = PROMPTS


def prompt_number(what: Tensor, style: Tensor, ink: Tensor, ground: Tensor) -> Tensor:
    """(n,) indices of words in WHAT, STYLE, INK and GROUND -> (n,) prompts."""
    return ((what * len(STYLE) + style) * len(INK) + ink) * len(GROUND) + ground


def prompt_parts(y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(n,) prompts -> the indices of their four words; the inverse of prompt_number."""
    ground, y = y % len(GROUND), y // len(GROUND)
    ink, y = y % len(INK), y // len(INK)
    return y // len(STYLE), y % len(STYLE), ink, ground


def word_ids(y: Tensor) -> Tensor:
    """(n,) prompts -> (n, 4) places in VOCABULARY; the null prompt is four times "nothing"."""
    first = torch.tensor([1, 1 + len(WHAT), 1 + len(WHAT) + len(STYLE), 0])
    first[3] = first[2] + len(INK)
    ids = torch.stack(prompt_parts(y), -1) + first
    return torch.where((y == NULL_PROMPT)[:, None], 0, ids)


def all_prompts() -> Tensor:
    """Every prompt that there are pictures of: (n,)."""
    y = torch.arange(PROMPTS)
    _, style, ink, _ = prompt_parts(y)
    # The coloured sets are drawn in many colours, the silhouettes in one.
    return y[(style == STYLE.index("silhouette")) == (ink > 0)]


def draw_prompts(n: int, generator: torch.Generator, concept: bool = False) -> Tensor:
    """n prompts that the pictures may have: (n,). Silhouettes have an ink unlike the ground."""
    what = torch.randint(len(WHAT) - 1, (n,), generator=generator)
    if concept:
        what = torch.full_like(what, WHAT.index(CONCEPT))
    style = torch.randint(len(STYLE), (n,), generator=generator)
    ground = torch.randint(len(GROUND), (n,), generator=generator)
    return prompt_number(what, style, draw_inks(style, ground, generator), ground)


def draw_inks(style: Tensor, ground: Tensor, generator: torch.Generator) -> Tensor:
    """(n,) inks: "many" for coloured sets, else one whose colour is not the ground's."""
    inks = [
        [INK.index(i) for i in INK[1:] if i.removeprefix("ink-") != colour] for colour in GROUND
    ]
    draw = torch.rand(len(style), generator=generator)
    picked = [inks[g][int(u * len(inks[g]))] for g, u in zip(ground.tolist(), draw, strict=True)]
    return torch.where(style == STYLE.index("silhouette"), torch.tensor(picked), 0)


def new_text_encoder() -> nn.Module:
    """CLIP's text model with two narrow layers, with fresh weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            projection_dim=WIDTH,
            # The pooled output is not used; these only have to be valid.
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def encode(encoder: nn.Module, y: Tensor) -> Tensor:
    """(n,) prompts -> tokens (n, 4, 64)."""
    return encoder(input_ids=word_ids(y)).last_hidden_state
