"""The blocks of every family in depth order, under the names that block weights have for them."""

from itertools import pairwise

import pytest

from prolora.architectures.depth import DepthTable
from prolora.architectures.families import known_families
from prolora.architectures.layouts import load_layout
from prolora.architectures.modules import find_block


def table(layout):
    family = next(one for one in known_families().values() if layout in one.layouts)
    return DepthTable(tuple(load_layout(layout).shapes), family)


def numbered(word, numbers):
    return tuple(f"{word}{n:02}" for n in numbers)


# As sd-webui-lora-block-weight lists them (BLOCKID26, 17, 20, 12 and BLOCKIDFLUX of its script).
PUBLISHED = {
    "sd15": [
        ("BASE", *numbered("IN", range(12)), "M00", *numbered("OUT", range(12))),
        ("BASE", *numbered("IN", (1, 2, 4, 5, 7, 8)), "M00", *numbered("OUT", range(3, 12))),
    ],
    "sdxl": [
        ("BASE", *numbered("IN", range(9)), "M00", *numbered("OUT", range(9))),
        ("BASE", *numbered("IN", (4, 5, 7, 8)), "M00", *numbered("OUT", range(6))),
    ],
    "flux1-dev": [
        ("CLIP", "T5", "IN", *numbered("D", range(19)), *numbered("S", range(38)), "OUT"),
    ],
}


@pytest.mark.parametrize("layout", PUBLISHED)
def test_the_blocks_are_those_of_the_published_notation(layout):
    assert list(table(layout).notations) == PUBLISHED[layout]


@pytest.mark.parametrize("family", known_families())
def test_every_module_of_a_block_has_a_place_and_blocks_follow_each_other(family):
    for layout in known_families()[family].layouts:
        found = table(layout)
        for module in found.modules:
            if find_block(module) is not None and not module.startswith("text_encoder"):
                assert found.find_place(module) in found.places, module
        assert len(set(found.places)) == len(found.places)
        stacks = [place.rpartition(".")[0] for place in found.places if "." in place]
        changes = sum(a != b for a, b in pairwise(stacks))
        assert changes == max(0, len(set(stacks)) - 1), "the blocks of a stack lie apart"


def test_a_pruned_student_takes_its_parents_blocks_too():
    assert {len(places) for places in table("ssd-1b").notations} == {20, 12, 11}


def test_a_module_is_called_by_its_authors_name_too():
    names = table("flux1-dev").list_names("transformer_blocks.3.attn.to_q")
    assert names == ["transformer_blocks.3.attn.to_q", "double_blocks.3.img_attn.qkv"]
    names = table("sdxl").list_names("down_blocks.1.attentions.0.proj_in")
    assert names == ["down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in"]
