"""Which family a LoRA is taken for: none rather than the wrong one."""

import pytest

from prolora.adapters.family_guess import guess_families, guess_family


@pytest.mark.parametrize(
    ("names", "width", "families"),
    [
        (
            ["transformer_blocks.18.attn.to_q", "single_transformer_blocks.37.attn.to_q"],
            3072,
            "flux",
        ),
        (["transformer_blocks.59.attn.to_q"], 3072, "qwen-image"),
        (["transformer_blocks.60.attn.to_q"], 3072, ""),
        (["transformer_blocks.37.attn.to_q"], 2432, "sd3"),
        (["transformer_blocks.41.attn.to_q"], 2432, ""),
    ],
)
def test_a_block_beyond_the_last_one_of_a_family_is_of_another(names, width, families):
    shapes = dict.fromkeys(names, (width, width))
    assert set(families.split()) <= set(guess_families(shapes, {}))
    assert families or not guess_families(shapes, {})


def test_metadata_decide_between_families_of_equal_sizes_and_veto_all_others():
    shapes = {"single_transformer_blocks.37.attn.to_q": (3072, 3072)}
    both = guess_families(shapes, {})
    assert "flux" in both
    assert guess_family(shapes, {"ss_base_model_version": "flux1"}) == "flux"
    assert guess_family(shapes, {"ss_base_model_version": "qwen_image"}) is None
