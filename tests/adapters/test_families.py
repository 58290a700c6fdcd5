"""Which family a LoRA is taken for: none rather than the wrong one."""

import pytest

from prolora.adapters.family import guess_family


@pytest.mark.parametrize(
    ("names", "width", "family"),
    [
        (
            ["transformer_blocks.18.attn.to_q", "single_transformer_blocks.37.proj_out"],
            3072,
            "flux",
        ),
        (["double_blocks.18.img_attn.qkv", "single_blocks.37.linear1"], 3072, "flux"),
        (["transformer_blocks.59.attn.to_q"], 3072, None),  # Qwen-Image
        (["single_transformer_blocks.47.attn.to_q"], 6144, None),  # FLUX.2
        (["double_blocks.19.img_attn.qkv"], 3072, None),  # HunyuanVideo
        (["transformer_blocks.37.attn.to_q"], 2432, "sd3"),
        (["transformer_blocks.41.attn.to_q"], 2432, None),
    ],
)
def test_a_block_beyond_the_last_one_of_a_family_is_of_another(names, width, family):
    assert guess_family(dict.fromkeys(names, width), {}) == family
