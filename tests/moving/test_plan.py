"""Every module of a LoRA ends as a pair, as skipped or as refused; counts as the layouts say."""

import json
import re

import pytest
import torch

import prolora
from prolora import LowRank, open_base
from prolora.adapters.adapter import Adapter
from prolora.architectures.families import known_families
from prolora.architectures.layouts import load_layout
from prolora.architectures.modules import matrix_shape
from prolora.errors import ShapeMismatch, UnsupportedFormat
from prolora.moving.plan import find_partners, make_plan


def base(layout):
    """A base of that layout whose weights take no room: views of one zero."""
    zero = torch.zeros(())
    return open_base(
        {name: zero.expand(shape) for name, shape in load_layout(layout).shapes.items()}
    )


def lora(layout, chosen=None):
    """A rank-1 LoRA on all attention modules of a layout."""
    shapes = load_layout(layout).shapes
    names = chosen or load_layout(layout).attention
    return Adapter(
        {
            name: LowRank(torch.ones(m, 1), torch.ones(1, n))
            for name in names
            for m, n in [matrix_shape(shapes[name])]
        }
    )


@pytest.mark.parametrize(
    "source, target, attention, every",
    [
        ("sdxl", "ssd-1b", (272, 288, 0), (429, 365, 0)),
        ("sdxl", "segmind-vega", (120, 440, 0), None),
        ("sdxl", "sdxl", (560, 0, 0), None),
        ("ssd-1b", "sdxl", (272, 0, 0), None),
        ("sd15", "sd21", (96, 0, 32), (250, 0, 32)),
        ("sd15", "bk-sdm-base", (80, 48, 0), (182, 100, 0)),
        ("sd15", "bk-sdm-tiny", (72, 56, 0), None),
        ("bk-sdm-base", "sd15", (80, 0, 0), None),
        ("sd15", "sdxl", (66, 40, 22), (180, 80, 22)),
        ("sdxl", "sd15", (66, 472, 22), (180, 592, 22)),
        ("flux1-dev", "flux1-schnell", (266, 0, 0), (502, 2, 0)),
        ("flux1-schnell", "flux1-dev", (266, 0, 0), None),
        ("sd3-medium", "sd3.5-medium", (191, 0, 0), (328, 0, 13)),
        ("sd3.5-medium", "sd3-medium", (191, 52, 0), None),
        ("pixart-alpha", "pixart-sigma", (224, 0, 0), (316, 4, 0)),
    ],
)
def test_the_pairs_of_the_known_layouts(source, target, attention, every):
    """(pairs, skipped, refused) of a LoRA on attention, and of one on every weight."""
    for chosen, counts in ((None, attention), (list(load_layout(source).shapes), every)):
        adapter = lora(source, chosen)
        plan = make_plan(adapter, base(source), base(target)) if counts else None
        if plan is not None:
            assert (len(plan.pairs), len(plan.skipped), len(plan.refused)) == counts
            ends = {pair.source for pair in plan.pairs} | {*plan.skipped, *plan.refused}
            assert ends == set(adapter.updates)


def test_projections_are_paired_whether_they_are_convolutions_or_linear():
    """1×1 convolutions in SD1.5, linear in SDXL; 3×3 ones are flattened."""
    plan = make_plan(lora("sd15", list(load_layout("sd15").shapes)), base("sd15"), base("sdxl"))
    pairs = {pair.target: pair for pair in plan.pairs}
    into = pairs["down_blocks.2.attentions.0.proj_in"]
    assert into.source == "down_blocks.2.attentions.0.proj_in" and into.shape == (1280, 1280)
    assert load_layout("sd15").shapes[into.source] == (1280, 1280, 1, 1)
    conv = pairs["mid_block.resnets.0.conv1"]
    assert conv.shape == (1280, 1280 * 9)


def test_modulation_of_flux_is_paired_and_of_other_widths_refused():
    names = [
        n for n in load_layout("flux1-dev").shapes if re.search(r"\.norm(1|1_context)?\.linear", n)
    ]
    plan = make_plan(lora("flux1-dev", names), base("flux1-dev"), base("flux1-schnell"))
    assert len(plan.pairs) == len(names) == 19 + 19 + 38 and not plan.skipped
    names = [n for n in load_layout("sd3-medium").shapes if n.endswith(".norm1.linear")]
    plan = make_plan(lora("sd3-medium", names), base("sd3-medium"), base("sd3.5-medium"))
    assert len(plan.refused) == 13
    assert "maps between widths" in plan.refused["transformer_blocks.0.norm1.linear"]


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
    back, _ = find_partners(base("bk-sdm-base"), base("sd15"))
    assert back[module.format(2)] == module.format(1)
    assert module.format(1) not in back


@pytest.mark.parametrize(
    "source, target",
    [
        ("sdxl", "flux1-dev"),
        ("flux1-dev", "sdxl"),
        ("sd15", "sd3-medium"),
        ("flux1-schnell", "sd3.5-medium"),
        ("sdxl", "pixart-sigma"),
    ],
)
def test_other_kinds_of_model_are_named_and_a_fit_is_offered(source, target):
    with pytest.raises(UnsupportedFormat, match="different kinds of model") as why:
        make_plan(lora(source), base(source), base(target))
    titles = [known_families()[base(id_).family].title for id_ in (source, target)]
    assert f"({titles[0]} and {titles[1]})" in str(why.value) and "`fit()`" in str(why.value)
    assert len(str(why.value).split()) < 55 and "train the LoRA" not in str(why.value)


def test_an_unknown_architecture_is_described():
    """Instead of guessed at."""
    unknown = open_base({f"transformer_blocks.{i}.attn.to_q": torch.ones(8, 8) for i in range(3)})
    said = "a transformer with 3 transformer blocks \\(3 in transformer_blocks\\) of width 8"
    with pytest.raises(UnsupportedFormat, match=said):
        make_plan(lora("sdxl"), base("sdxl"), unknown)
    with pytest.raises(UnsupportedFormat, match=said):
        make_plan(lora("sdxl"), unknown, base("sdxl"))


def test_known_layouts_without_a_rule_are_refused_and_the_message_offers_a_map():
    with pytest.raises(UnsupportedFormat, match="by their weights"):
        make_plan(lora("sd21"), base("sd21"), base("bk-sdm-base"))


def test_an_update_that_does_not_fit_its_module_names_both_shapes_and_the_tensor():
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    wrong = Adapter({name: LowRank(torch.ones(640, 2), torch.ones(2, 639))})
    with pytest.raises(ShapeMismatch, match=re.escape(name) + ".*640×639.*640×640"):
        make_plan(wrong, base("sdxl"), base("ssd-1b"))


@pytest.mark.parametrize(
    "layout, module, shape",
    [("flux1-dev", "x_embedder", (3072, 128)), ("sd15", "conv_in", (320, 9 * 9))],
)
def test_a_lora_that_takes_a_second_image_is_named(layout, module, shape):
    update = LowRank(torch.zeros(shape[0], 4), torch.zeros(4, shape[1]))
    with pytest.raises(ShapeMismatch, match=r"LoRA for control, editing or inpainting.*the source"):
        make_plan(Adapter({module: update}), base(layout), base(layout))


def test_a_plan_where_every_width_differs_is_refused():
    names = [n for n in load_layout("sd15").attention if n.endswith("attn2.to_k")]
    with pytest.raises(ShapeMismatch, match="no module of this LoRA fits"):
        make_plan(lora("sd15", names), base("sd15"), base("sd21"))


def test_a_users_map_replaces_the_rule_and_may_feed_one_source_to_several_targets(tmp_path):
    source = open_base({"a": torch.ones(4, 3), "b": torch.ones(4, 3)})
    target = open_base({"x": torch.ones(4, 3), "y": torch.ones(4, 3), "z": torch.ones(5, 3)})
    adapter = Adapter(
        {
            "a": LowRank(torch.ones(4, 1), torch.ones(1, 3)),
            "b": LowRank(torch.ones(4, 1), torch.ones(1, 3)),
        }
    )
    table = {"x": "a", "y": "a", "z": "a"}
    file = tmp_path / "map.json"
    file.write_text(json.dumps(table))
    for match in (table, file, str(file)):
        plan = make_plan(adapter, source, target, match)
        assert [(p.source, p.target) for p in plan.pairs] == [("a", "x"), ("a", "y")]
        assert set(plan.skipped) == {"b"} and not plan.refused
        moved = prolora.transfer(adapter, source, target, match=match, method="copy").report
        assert moved.totals["energy_mapped"] == 0.5  # of a and b, though a is there twice
    with pytest.raises(UnsupportedFormat, match="lacks, the first: q"):
        make_plan(adapter, source, target, {"q": "a"})
    with pytest.raises(UnsupportedFormat, match="neither"):
        make_plan(adapter, source, target, "no-such-file.json")


def test_text_encoder_modules_pass_through_or_are_skipped_as_asked():
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    adapter = lora("sdxl", load_layout("sdxl").attention[:1])
    adapter.updates[name] = LowRank(torch.ones(768, 1), torch.ones(1, 768))
    plan = make_plan(adapter, base("sdxl"), base("ssd-1b"))
    assert plan.passed == [name] and len(plan.pairs) == 1
    plan = make_plan(adapter, base("sdxl"), base("ssd-1b"), text_encoder="skip")
    assert "as asked" in plan.skipped[name] and not plan.passed


TEXT = "{}.text_model.encoder.layers.0.self_attn.q_proj"


def with_text(layout, *encoders):
    """A LoRA on one attention module and on the named text encoders."""
    adapter = lora(layout, load_layout(layout).attention[:1])
    for encoder in encoders:
        adapter.updates[TEXT.format(encoder)] = LowRank(torch.ones(8, 1), torch.ones(1, 8))
    return adapter


def test_updates_of_a_text_encoder_that_the_target_lacks_are_skipped():
    """SD1.5 has SDXL's first one, SD2.1 another one of the same name."""
    name = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    adapter = lora("sdxl", [name])
    adapter.updates.update(with_text("sdxl", "text_encoder", "text_encoder_2").updates)
    plan = make_plan(adapter, base("sdxl"), base("sd15"))
    assert plan.passed == [TEXT.format("text_encoder")]
    assert (
        "no text encoder where the source has clip-bigg"
        in plan.skipped[TEXT.format("text_encoder_2")]
    )
    plan = make_plan(with_text("sd15", "text_encoder"), base("sd15"), base("sd21"))
    assert "clip-h where the source has clip-l" in plan.skipped[TEXT.format("text_encoder")]


def test_text_encoders_are_projected_where_both_bases_hold_them():
    name = TEXT.format("text_encoder")
    unet = {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": torch.ones(4, 4)}
    source, target = (open_base({**unet, name: torch.ones(8, 8)}) for _ in range(2))
    adapter = Adapter({name: LowRank(torch.ones(8, 1), torch.ones(1, 8))})
    plan = make_plan(adapter, source, target, text_encoder="project")
    assert [(p.source, p.target, p.shape) for p in plan.pairs] == [(name, name, (8, 8))]
    assert make_plan(adapter, source, target).passed == [name]
    adapter.updates[next(iter(unet))] = LowRank(torch.ones(4, 1), torch.ones(1, 4))
    plan = make_plan(adapter, source, open_base(unet), text_encoder="project")
    assert "cannot be projected" in plan.refused[name] and len(plan.pairs) == 1


def test_a_kernel_of_another_shape_and_equal_size_is_refused():
    name = "down_blocks.0.resnets.0.conv1"
    lora = {
        f"unet.{name}.lora_A.weight": torch.randn(4, 8, 3, 3),
        f"unet.{name}.lora_B.weight": torch.randn(16, 4, 1, 1),
    }
    source, same, other = (torch.randn(16, *kernel) for kernel in [(8, 3, 3)] * 2 + [(72, 1, 1)])
    report = prolora.transfer(lora, {name: source}, {name: same}, method="copy").report
    assert report.totals["mapped"] == 1
    with pytest.raises(ShapeMismatch, match="16×72×1×1 on the target but 16×8×3×3 on the source"):
        prolora.transfer(lora, {name: source}, {name: other}, method="copy")
