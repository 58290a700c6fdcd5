"""Wan 2.1 and 2.2: text, images, speech or motion to video, VACE; SkyReels-V2.

Wan 2.2 A14B has two experts of one shape. The authors use ComfyUI's names. Their `norm3` is `norm2`
in diffusers, and the reverse. diffusers has no class of S2V: what only S2V has keeps its name.
SkyReels-V2 at 14B has the names and shapes of Wan 2.1 at 14B and is recognised as that.
"""

from ..family import Family, fuse_equal

_BLOCK = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
# Of Animate's encoder of motions: a file's place in its list of layers -> diffusers' layer.
_MOTION = {"conv1.0": "conv1", "conv2.1": "conv2", "skip.1": "conv_skip"}

FAMILY = Family(
    id="wan",
    title="Wan",
    experts=True,
    untried=("motion_", "face_encoder.conv", "casual_audio_encoder.encoder.conv", "frame_", "fps_"),
    layouts=(
        "wan-t2v-14b",
        "wan2.2-i2v-14b",
        "wan2.1-i2v-14b",
        "wan2.1-flf2v-14b",
        "wan-t2v-1.3b",
        "wan2.2-ti2v-5b",
        "wan2.1-vace-14b",
        "wan2.1-vace-1.3b",
        "wan2.2-animate-14b",
        "wan2.2-s2v-14b",
        "skyreels-v2-df-1.3b",
        "skyreels-v2-i2v-1.3b",
    ),
    authors={
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        **{
            f"{blocks}.N.{name}": f"{blocks}.N.{to}"
            for blocks in ("blocks", "vace_blocks")
            for name, to in _BLOCK.items()
        },
        "blocks.N.cross_attn.k_img": "blocks.N.attn2.add_k_proj",
        "blocks.N.cross_attn.v_img": "blocks.N.attn2.add_v_proj",
        "vace_blocks.N.before_proj": "vace_blocks.N.proj_in",
        "vace_blocks.N.after_proj": "vace_blocks.N.proj_out",
        "head.head": "proj_out",
        "head.modulation": "scale_shift_table",
        "fps_projection.0": "fps_projection.net.0.proj",
        "fps_projection.2": "fps_projection.net.2",
        "face_adapter.fuser_blocks.N.linear1_q": "face_adapter.N.to_q",
        "face_adapter.fuser_blocks.N.linear1_kv": fuse_equal(
            "face_adapter.N.to_k", "face_adapter.N.to_v"
        ),
        "face_adapter.fuser_blocks.N.linear2": "face_adapter.N.to_out",
        "face_encoder.conv1_local.conv": "face_encoder.conv1_local",
        "face_encoder.conv2.conv": "face_encoder.conv2",
        "face_encoder.conv3.conv": "face_encoder.conv3",
        "motion_encoder.dec.direction": "motion_encoder.motion_synthesis_weight",
        "motion_encoder.enc.fc.N": "motion_encoder.motion_network.N",
        "motion_encoder.enc.net_app.convs.0.0": "motion_encoder.conv_in",
        "motion_encoder.enc.net_app.convs.8": "motion_encoder.conv_out",
        **{
            f"motion_encoder.enc.net_app.convs.{number + 1}.{name}": (
                f"motion_encoder.res_blocks.{number}.{to}"
            )
            for number in range(7)
            for name, to in _MOTION.items()
        },
    },
    claims={
        # musubi-tuner writes "wan" and "wan2.1", ai-toolkit "wan_2.1", "wan_2.2_14b", "wan_2.2_5b".
        "wan_2.2_14b": "Wan 2.2 A14B",
        "wan_2.2_5b": "Wan 2.2 TI2V 5B",
        "wan": "Wan",
    },
)
