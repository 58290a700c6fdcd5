"""Underscored kohya names -> dotted names, by the words with underscores.

kohya writes `down_blocks.0.attentions.0.proj_in` as `down_blocks_0_attentions_0_proj_in`. A
vocabulary of the words that contain underscores themselves is enough to undo it, with no base model
at hand.
"""

from __future__ import annotations

import re

_UNET = """
down_blocks up_blocks mid_block resnets attentions downsamplers upsamplers transformer_blocks
conv conv1 conv2 conv_in conv_out conv_shortcut time_emb_proj proj proj_in proj_out
attn1 attn2 to_q to_k to_v to_out ff net
time_embedding add_embedding linear_1 linear_2
norm norm1 norm2 norm3 conv_norm_out
"""
_SGM = """
input_blocks middle_block output_blocks in_layers out_layers emb_layers skip_connection op
time_embed label_emb out
qkv encoder_kv model network module net unet
"""
_CLIP = """
text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection
embeddings token_embedding position_embedding layer_norm1 layer_norm2 final_layer_norm
"""
_T5 = """
block layer SelfAttention EncDecAttention DenseReluDense q k v o wi wi_0 wi_1 wo
"""

_LANGUAGE_MODEL = """
o_proj gate_proj up_proj down_proj input_layernorm post_attention_layernorm q_norm k_norm
"""

_WORDS = sorted((_UNET + _SGM + _CLIP + _T5 + _LANGUAGE_MODEL).split(), key=len, reverse=True)
_WORD = re.compile(rf"(?:{'|'.join(_WORDS)}|[0-9]+)(?=_|\Z)")


def restore_dots(underscored: str) -> str | None:
    """Turns `down_blocks_0_conv_in` into `down_blocks.0.conv_in`; None for unknown words.

    The longest known word always wins, so `conv_in` is never read as `conv.in`.
    """
    words, at = [], 0
    while at <= len(underscored):
        match = _WORD.match(underscored, at)
        if match is None:
            return None
        words.append(match[0])
        at = match.end() + 1
    return ".".join(words)
