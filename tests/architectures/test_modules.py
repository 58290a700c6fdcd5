"""What a module's name says about it: its block, its stage, whether LoRAs are trained on it."""

import pytest

from prolora.architectures import layouts
from prolora.architectures.modules import find_block, find_stage, is_adaptable, is_attention

TABLE = "video_a2v_cross_attn_scale_shift_table"
IN_BLOCKS = [
    # stack, number and name inside the block; whether it is attention, whether it is adapted
    ("blocks 7 attn1.to_q", True, True),
    ("blocks 7 ffn.net.0.proj", False, True),
    ("blocks 7 self_attn.q_proj", True, True),
    ("blocks 7 adaln_modulation_mlp.2", False, False),
    ("blocks 7 modulation", False, False),
    ("layers 29 attention.to_out.0", True, True),
    ("layers 29 adaLN_modulation.0", False, False),
    ("context_refiner 1 feed_forward.w2", False, True),
    ("llm_adapter.blocks 0 mlp.0", False, True),
    ("double_stream_blocks 3 block.ff_i.experts.2.w1", False, True),
    ("context_embedder.token_refiner.refiner_blocks 1 attn.to_q", True, True),
    ("transformer_blocks 5 audio_to_video_attn.to_k", True, True),
    ("transformer_blocks 5 img_mod.1", False, False),
    ("transformer_blocks 5 attn.to_gate", True, True),
    (f"transformer_blocks 5 {TABLE}", False, False),
    ("double_layers 1 modCX.1", False, False),
    ("double_blocks 4 img_attn_qkv", True, True),
    ("joint_blocks 2 x_block.attn.qkv", True, True),
]


@pytest.mark.parametrize(("place", "attention", "adapted"), IN_BLOCKS)
def test_a_list_of_blocks_is_known_by_its_form_and_not_by_its_name(place, attention, adapted):
    module = place.replace(" ", ".")
    assert find_block(module) == tuple(place.split())
    assert find_stage(module) == place.split()[0]
    assert (is_attention(module), is_adaptable(module)) == (attention, adapted)


SINGLE = """
img_emb.proj.1 t_embedder.mlp.0 caption_projection.3.linear 0.weight a..b
condition_embedder.image_embedder.ff.net.0.proj all_final_layer.2-1.linear
distilled_guidance_layer.layers.0.linear_1 down_blocks.0.resnets.1.conv1
text_encoder.text_model.encoder.layers.0.self_attn.q_proj mid_block.attentions.0.proj_in
"""


def test_a_single_layer_with_a_number_is_no_block_and_unets_have_only_transformer_blocks():
    for module in ("", *SINGLE.split()):
        assert find_block(module) is None, module


@pytest.mark.parametrize("id_", layouts.known_layouts())
def test_in_the_known_layouts_attention_and_feed_forward_are_what_is_adapted(id_):
    """And the projections around them, and blocks beside the main ones (Anima's adapter)."""
    layout = layouts.load_layout(id_)
    adapted = {name for name in layout.shapes if is_adaptable(name)}
    named = {name for name in layout.adapted if not name.startswith(layout.unnamed_stacks)}
    assert named <= adapted and adapted
    assert {name for name in adapted if is_attention(name)} >= set(layout.attention)
    beside = adapted - set(layout.adapted)
    assert all(name.endswith((".proj_in", ".proj_out")) or find_block(name) for name in beside)
