"""FLUX.3 [klein]: streams of the image, of images it depends on, and of text, then joint blocks.

`norm_out.linear` makes (scale, shift) in diffusers and (shift, scale) in the authors' files.
"""

from ..family import Family, Swapped

_BLOCKS = {
    "content_mode_blocks.image.N": "mode_blocks.image.N",
    "content_mode_blocks.image_cond.N": "mode_blocks.image_cond.N",
    "txt_mode_blocks.N": "txt_mode_blocks.N",
    "single_blocks.N": "single_transformer_blocks.N",
}
_LAYERS = {
    "q_proj": "attn.to_q",
    "k_proj": "attn.to_k",
    "v_proj": "attn.to_v",
    "attn_out": "attn.to_out.0",
    "mlp_in": "ff.linear_in",
    "mlp_out": "ff.linear_out",
}
_MODULATIONS = [
    f"{stage}_stream_modulations.{stream}"
    for stage in ("early", "single")
    for stream in ("image", "image_cond", "txt")
]

FAMILY = Family(
    id="flux3",
    title="FLUX.3",
    layouts=("flux3-klein", "flux3-klein-distilled"),
    authors={
        "emb_in.image": "x_embedders.image",
        "emb_in.image_cond": "x_embedders.image_cond",
        "txt_in": "context_embedder",
        "time_in.in_layer": "timestep_embedder.linear_1",
        "time_in.out_layer": "timestep_embedder.linear_2",
        "ref_time_in.in_layer": "target_timestep_embedder.linear_1",
        "ref_time_in.out_layer": "target_timestep_embedder.linear_2",
        **{f"{name}.lin": f"{name}.linear" for name in _MODULATIONS},
        **{
            f"{ours}.{layer}": f"{theirs}.{name}"
            for ours, theirs in _BLOCKS.items()
            for layer, name in _LAYERS.items()
        },
        "final_layer.image.adaLN_modulation.1": Swapped("norm_out.linear"),
        "final_layer.image.linear": "proj_out",
    },
)
