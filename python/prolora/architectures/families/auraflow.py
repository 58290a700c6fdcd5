"""AuraFlow and Pony V7: four blocks of two streams, then thirty-two of one.

The authors number the streams: 1 is the text, 2 the image, and in single blocks 1 is both.
"""

from ..family import Family, Swapped

_SINGLE, _JOINT = "single_transformer_blocks.N", "joint_transformer_blocks.N"
_FEED_FORWARD = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
_IMAGE = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_TEXT = {"q": "add_q_proj", "k": "add_k_proj", "v": "add_v_proj", "o": "to_add_out"}

_OTHERS: dict[str, str | Swapped] = {
    "positional_encoding": "pos_embed.pos_embed",
    "init_x_linear": "pos_embed.proj",
    "cond_seq_linear": "context_embedder",
    "t_embedder.mlp.0": "time_step_proj.linear_1",
    "t_embedder.mlp.2": "time_step_proj.linear_2",
    "double_layers.N.modX.1": f"{_JOINT}.norm1.linear",
    "double_layers.N.modC.1": f"{_JOINT}.norm1_context.linear",
    "single_layers.N.modCX.1": f"{_SINGLE}.norm1.linear",
    "modF.1": Swapped("norm_out.linear"),
    "final_linear": "proj_out",
}

FAMILY = Family(
    id="auraflow",
    title="AuraFlow",
    layouts=("auraflow",),
    authors=_OTHERS
    | {f"double_layers.N.attn.w1{x}": f"{_JOINT}.attn.{name}" for x, name in _TEXT.items()}
    | {f"double_layers.N.attn.w2{x}": f"{_JOINT}.attn.{name}" for x, name in _IMAGE.items()}
    | {f"single_layers.N.attn.w1{x}": f"{_SINGLE}.attn.{name}" for x, name in _IMAGE.items()}
    | {f"double_layers.N.mlpX.{x}": f"{_JOINT}.ff.{y}" for x, y in _FEED_FORWARD.items()}
    | {f"double_layers.N.mlpC.{x}": f"{_JOINT}.ff_context.{y}" for x, y in _FEED_FORWARD.items()}
    | {f"single_layers.N.mlp.{x}": f"{_SINGLE}.ff.{y}" for x, y in _FEED_FORWARD.items()},
    claims={"auraflow": "AuraFlow"},  # ai-toolkit
)
