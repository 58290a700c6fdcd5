"""Files that hold no diffusion model: how they are told from one, by their names alone.

Every diffusion transformer has a list of blocks with attention in them, whatever it calls them.
Language models, text and image encoders have such lists too. Those are known by names of their own
(`embed_tokens`, `input_layernorm`, `vision_model`), which a diffusion model has only beside layers
that take in the time step: some diffusion models are language models with such layers added.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from ...architectures.modules import find_block, is_attention

# Kinds of model and parts of their names, the most telling first.
_OTHER_MODELS = (
    (
        "a training state",
        r"(?:^|\.)(?:exp_avg(?:_sq)?|momentum_buffer|optimizer(?:_states?)?|param_groups)(?:\.|$)",
    ),
    (
        "a CLIP or SigLIP model",
        r"(?:^|\.)(?:text_model|vision_model|visual_projection|embeddings\.\w+_embedding)\.",
    ),
    (
        "an image encoder",
        r"(?:^|\.)(?:cls_token|mask_token|image_encoder|visual|patch_embeddings)(?:\.|$)",
    ),
    ("a CLIP model", r"(?:^|\.)resblocks\.\d+\."),
    ("a T5 encoder", r"(?:^|\.)(?:encoder|decoder)\.block\.\d+\.layer\.\d+\."),
    (
        "a language model",
        r"(?:^|\.)(?:lm_head|embed_tokens|input_layernorm|post_attention_layernorm|token_embd|wte"
        r"|word_embeddings)(?:\.|$)",
    ),
    (
        "an upscaler",
        r"(?:^|\.)(?:conv_first|conv_after_body|conv_last|residual_group|upsampler?)\.",
    ),
)
_VAE = re.compile(
    r"(?:^|\.)(?:encoder|decoder)\.(?:conv_?in|conv1|conv_?out|head|down|up|mid|middle|downsamples"
    r"|upsamples|down_blocks|up_blocks|mid_block)\d*\."
)
_TIME = re.compile(
    r"(?:^|[._])(?:t_|(?:time|timestep|sigma|noise)_?)(?:\w*embed\w*|emb|in|proj\w*|block|mlp)(?:[._]|$)"
    r"|(?:^|\.)(?:temb|map_noise|map_layer\d)(?:[._]|$)"
    r"|(?:^|[._])(?:ada_?ln\w*|ada_?norm\w*|modulation|scale_shift_table|mod|mod[CX]+)(?:[._]|$)",
    re.IGNORECASE,
)
_BLOCK_LIST = re.compile(r"(?:^|\.)(?:[^.]*blocks|layers)\.\d+\.")


def explain_other_model(keys: Collection[str]) -> str | None:
    """Describes what a file without a diffusion model is; None if it may hold one.

    `keys` are all keys of the file, without a common prefix.
    """
    in_vae = [key for key in keys if _VAE.search(key)]
    if 2 * len(in_vae) > len(keys):
        return f"looks like a VAE (it has {in_vae[0]})"
    with_time = any(_TIME.search(key) for key in keys)
    for what, names in _OTHER_MODELS:
        key = next((key for key in keys if re.search(names, key)), None)
        if key is not None and (what == "a training state" or not with_time):
            return f"looks like {what} (it has {key})"
    return None


def explain_no_blocks(keys: Collection[str]) -> str | None:
    """Explains why a file holds no diffusion model; None if it may hold one.

    A network without blocks or attention may be one too, if it takes in the time step. `keys` are
    all keys of the file, without a common prefix.
    """
    if any(_TIME.search(key) for key in keys):
        return None
    paths = (key.removesuffix(".weight") for key in keys)
    if not any(find_block(path) and is_attention(path) for path in paths):
        listed = any(_BLOCK_LIST.search(key) for key in keys)
        start = f"it starts with {', '.join(list(keys)[:3])}" if keys else "it is empty"
        return f"has no {'attention in its blocks' if listed else 'list of blocks'} ({start})"
    return None
