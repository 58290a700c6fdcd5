"""LTX-2, 2.3 and 2.5: video and sound in two streams of one transformer.

Blocks have the same names in the authors' files and in diffusers. The authors' connectors of the
text encoder (`video_embeddings_connector`, `audio_embeddings_connector`) are another model in
diffusers and not described here.
"""

from ..family import Family

# The authors' layers that make scales and shifts from the time -> diffusers'.
_MODULATIONS = {
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
}
_LAYERS = ("linear", "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2")

FAMILY = Family(
    id="ltx2",
    title="LTX-2",
    layouts=("ltx2", "ltx2.3", "ltx2.5"),
    authors={
        "patchify_proj": "proj_in",
        "audio_patchify_proj": "audio_proj_in",
        "transformer_blocks.N.scale_shift_table_a2v_ca_video": (
            "transformer_blocks.N.video_a2v_cross_attn_scale_shift_table"
        ),
        "transformer_blocks.N.scale_shift_table_a2v_ca_audio": (
            "transformer_blocks.N.audio_a2v_cross_attn_scale_shift_table"
        ),
        **{
            f"{ours}.{layer}": f"{theirs}.{layer}"
            for ours, theirs in _MODULATIONS.items()
            for layer in _LAYERS
        },
    },
    claims={"ltx2": "LTX-2"},  # ai-toolkit
)
