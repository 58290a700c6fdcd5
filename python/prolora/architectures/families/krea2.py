"""Krea 2: Raw and Turbo. Four times as many queries as keys and values, nothing fused."""

from ..family import Family

_ATTENTION = {"wq": "to_q", "wk": "to_k", "wv": "to_v", "wo": "to_out.0", "gate": "to_gate"}
_STACKS = {
    "blocks.N": "transformer_blocks.N",
    "txtfusion.layerwise_blocks.N": "text_fusion.layerwise_blocks.N",
    "txtfusion.refiner_blocks.N": "text_fusion.refiner_blocks.N",
}

FAMILY = Family(
    id="krea2",
    title="Krea 2",
    layouts=("krea2",),
    authors={
        "first": "img_in",
        "tmlp.0": "time_embed.linear_1",
        "tmlp.2": "time_embed.linear_2",
        "tproj.1": "time_mod_proj",
        "txtmlp.1": "txt_in.linear_1",
        "txtmlp.3": "txt_in.linear_2",
        "txtfusion.projector": "text_fusion.projector",
        "blocks.N.mod.lin": "transformer_blocks.N.scale_shift_table",
        "last.linear": "final_layer.linear",
        "last.modulation.lin": "final_layer.scale_shift_table",
    }
    | {
        f"{theirs}.attn.{name}": f"{ours}.attn.{module}"
        for theirs, ours in _STACKS.items()
        for name, module in _ATTENTION.items()
    }
    | {
        f"{theirs}.mlp.{name}": f"{ours}.ff.{name}"
        for theirs, ours in _STACKS.items()
        for name in ("gate", "up", "down")
    },
    claims={
        "krea2": "Krea 2",  # ai-toolkit, musubi-tuner
        "krea-2": "Krea 2",  # musubi-tuner, OneTrainer
    },
)
