"""Every module of a LoRA ends as a pair, as skipped or as refused; counts as the layouts say."""

import json
import re

import pytest
import torch

from prolora import LowRank, ShapeMismatch, UnsupportedFormat, open_base
from prolora.adapters.adapter import Adapter
from prolora.bases import load
from prolora.bases.modules import matrix_shape
from prolora.pairing import feeds, make_plan


def base(layout):
    """A base of that layout whose weights take no room: views of one zero."""
    zero = torch.zeros(())
    return open_base({name: zero.expand(shape) for name, shape in load(layout).shapes.items()})


def lora(layout, chosen=None):
    """A rank-1 LoRA on all attention modules of a layout."""
    shapes = load(layout).shapes
    names = chosen or load(layout).attention
    return Adapter(
        {
            name: LowRank(torch.ones(m, 1), torch.ones(1, n))
            for name in names
            for m, n in [matrix_shape(shapes[name])]
        }
    )


@pytest.mark.parametrize(
    "source, target, mapped, skipped, refused",
    [
        ("sdxl", "ssd-1b", 272, 288, 0),
        ("sdxl", "segmind-vega", 120, 440, 0),
        ("sdxl", "sdxl", 560, 0, 0),
        ("ssd-1b", "sdxl", 272, 0, 0),
        ("sd15", "sd21", 96, 0, 32),
        ("sd15", "bk-sdm-base", 80, 48, 0),
        ("sd15", "bk-sdm-tiny", 72, 56, 0),
        ("bk-sdm-base", "sd15", 80, 0, 0),
        ("sd15", "sdxl", 66, 40, 22),
        ("sdxl", "sd15", 66, 472, 22),
    ],
)
def test_the_pairs_of_the_known_layouts(source, target, mapped, skipped, refused):
    adapter = lora(source)
    plan = make_plan(adapter, base(source), base(target))
    assert (len(plan.pairs), len(plan.skipped), len(plan.refused)) == (mapped, skipped, refused)
    ends = {pair.source for pair in plan.pairs} | set(plan.skipped) | set(plan.refused)
    assert ends == set(adapter.updates)


def test_skipped_and_refused_modules_say_why():
    plan = make_plan(lora("sdxl"), base("sdxl"), base("ssd-1b"))
    assert set(plan.skipped.values()) == {"the target has no such module"}
    plan = make_plan(lora("sd15"), base("sd15"), base("sd21"))
    reason = next(iter(plan.refused.values()))
    assert re.search(r"320×1024 on the target but 320×768 on the source", reason)


def test_students_that_renumber_their_blocks_are_not_matched_by_name():
    """BK-SDM's up_blocks.1.attentions.1 was made from the teacher's attentions.2."""
    plan = make_plan(lora("sd15"), base("sd15"), base("bk-sdm-base"))
    pairs = {pair.target: pair.source for pair in plan.pairs}
    module = "up_blocks.1.attentions.{}.transformer_blocks.0.attn1.to_q"
    assert pairs[module.format(1)] == module.format(2)
    back, _ = feeds(base("bk-sdm-base"), base("sd15"))
    assert back[module.format(2)] == module.format(1)
    assert module.format(1) not in back


def test_known_layouts_without_a_rule_are_refused_and_the_message_offers_a_map():
    with pytest.raises(UnsupportedFormat, match="--match"):
        make_plan(lora("sd21"), base("sd21"), base("bk-sdm-base"))


def test_a_lora_for_another_architecture_is_refused():
    with pytest.raises(UnsupportedFormat, match=r"do not exist in the source base .*sdxl"):
        make_plan(lora("sd15"), base("sdxl"), base("ssd-1b"))


def test_an_update_that_does_not_fit_its_module_names_both_shapes_and_the_tensor():
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    wrong = Adapter({name: LowRank(torch.ones(640, 2), torch.ones(2, 639))})
    with pytest.raises(ShapeMismatch, match=re.escape(name) + ".*640×639.*640×640"):
        make_plan(wrong, base("sdxl"), base("ssd-1b"))


def test_a_plan_where_every_width_differs_is_refused():
    names = [n for n in load("sd15").attention if n.endswith("attn2.to_k")]
    with pytest.raises(ShapeMismatch, match="no module of this LoRA fits"):
        make_plan(lora("sd15", names), base("sd15"), base("sd21"))


def test_a_users_map_replaces_the_rule_and_may_feed_one_source_to_several_targets(tmp_path):
    source = open_base({"a": torch.ones(4, 3), "b": torch.ones(4, 3)})
    target = open_base({"x": torch.ones(4, 3), "y": torch.ones(4, 3), "z": torch.ones(5, 3)})
    adapter = Adapter({"a": LowRank(torch.ones(4, 1), torch.ones(1, 3)),
                       "b": LowRank(torch.ones(4, 1), torch.ones(1, 3))})  # fmt: skip
    table = {"x": "a", "y": "a", "z": "a"}
    file = tmp_path / "map.json"
    file.write_text(json.dumps(table))
    for match in (table, file, str(file)):
        plan = make_plan(adapter, source, target, match)
        assert [(p.source, p.target) for p in plan.pairs] == [("a", "x"), ("a", "y")]
        assert set(plan.skipped) == {"b"} and not plan.refused
    with pytest.raises(UnsupportedFormat, match="lacks, the first: q"):
        make_plan(adapter, source, target, {"q": "a"})
    with pytest.raises(UnsupportedFormat, match="neither"):
        make_plan(adapter, source, target, "no-such-file.json")


def test_text_encoder_modules_pass_through_or_are_skipped_as_asked():
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    adapter = lora("sdxl", load("sdxl").attention[:1])
    adapter.updates[name] = LowRank(torch.ones(768, 1), torch.ones(1, 768))
    plan = make_plan(adapter, base("sdxl"), base("ssd-1b"))
    assert plan.passed == [name] and len(plan.pairs) == 1
    plan = make_plan(adapter, base("sdxl"), base("ssd-1b"), text_encoder="skip")
    assert "as asked" in plan.skipped[name] and not plan.passed
