"""Underscored kohya names -> dotted names, by the words with underscores.

kohya writes `down_blocks.0.attentions.0.proj_in` as `down_blocks_0_attentions_0_proj_in`. A
vocabulary of the words that contain underscores themselves is enough to undo it, with no base model
at hand.
"""

from __future__ import annotations

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

_WORDS = frozenset(
    tuple(word.split("_")) for word in (_UNET + _SGM + _CLIP + _T5 + _LANGUAGE_MODEL).split()
)
_LONGEST = max(map(len, _WORDS))


def restore_dots(underscored: str) -> str | None:
    """Turns `down_blocks_0_conv_in` into `down_blocks.0.conv_in`; None for unknown words.

    The longest known word always wins, so `conv_in` is never read as `conv.in`.
    """
    tokens = tuple(underscored.split("_"))
    words: list[str] = []
    at = 0
    while at < len(tokens):
        length = _word_length(tokens, at)
        if length == 0:
            return None
        words.append("_".join(tokens[at : at + length]))
        at += length
    return ".".join(words)


def _word_length(tokens: tuple[str, ...], at: int) -> int:
    """Counts the tokens from `at` on that make one word; 0 if none do."""
    for length in range(min(_LONGEST, len(tokens) - at), 0, -1):
        if tokens[at : at + length] in _WORDS:
            return length
    # isdecimal alone accepts the digits of every script.
    return 1 if tokens[at].isascii() and tokens[at].isdecimal() else 0
