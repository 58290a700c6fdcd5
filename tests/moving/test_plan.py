"""Every module of a LoRA ends as a pair, as skipped or as refused; counts as the layouts say."""

import json
import re

import pytest
import torch

import prolora
from prolora import Adapter, LowRank, open_base
from prolora.architectures.families import known_families
from prolora.architectures.layouts import load_layout
from prolora.architectures.modules import matrix_shape
from prolora.errors import ShapeMismatch, UnsupportedFormat


def list_shapes(layout, pattern=""):
    """Module -> shape of its weight, of a published size."""
    shapes = load_layout(layout).shapes
    return {name: shape for name, shape in shapes.items() if re.search(pattern, name)}


def base(layout):
    """A base of that layout whose weights take no room: views of one zero."""
    zero = torch.zeros(())
    return open_base({name: zero.expand(shape) for name, shape in list_shapes(layout).items()})


def lora(layout, chosen=None):
    """A rank-1 LoRA on all attention modules of a layout."""
    shapes = list_shapes(layout)
    names = load_layout(layout).attention if chosen is None else chosen
    sizes = {name: matrix_shape(shapes[name]) for name in names}
    return Adapter({n: LowRank(torch.ones(m, 1), torch.ones(1, k)) for n, (m, k) in sizes.items()})


def plan(adapter, source, target, **options):
    source, target = (base(x) if isinstance(x, str) else x for x in (source, target))
    return prolora.transfer(adapter, source, target, dry_run=True, **options).report


def list_pairs(report):
    return [(row.source, row.target) for row in report.rows("mapped")]


def list_reasons(report, status):
    return {row.source: row.reason for row in report.rows(status)}


@pytest.mark.parametrize(
    "source, target, attention, every",
    [
        ("sdxl", "ssd-1b", (272, 288, 0), (429, 365, 0)),
        ("ssd-1b", "sdxl", (272, 0, 0), None),
        ("sd15", "sd21", (96, 0, 32), (250, 0, 32)),
        ("sd15", "bk-sdm-base", (80, 48, 0), (182, 100, 0)),
        ("sd15", "sdxl", (66, 40, 22), (180, 80, 22)),
        ("flux1-dev", "flux1-schnell", (266, 0, 0), (502, 2, 0)),
        ("sd3-medium", "sd3.5-medium", (191, 0, 0), (328, 0, 13)),
        ("pixart-alpha", "pixart-sigma", (224, 0, 0), (316, 4, 0)),
    ],
)
def test_the_pairs_of_the_known_layouts(source, target, attention, every):
    """(pairs, skipped, refused) of a LoRA on attention, and of one on every weight."""
    for chosen, counts in ((None, attention), (list_shapes(source), every)):
        if counts:
            adapter = lora(source, chosen)
            report = plan(adapter, source, target)
            found = tuple(report.totals[x] for x in ("mapped", "skipped", "refused"))
            assert found == counts
            refused = list_reasons(report, "refused").values()
            assert all("maps between widths" in reason for reason in refused)
            assert {row.source for row in report.modules} == set(adapter.updates)


def test_projections_are_paired_whether_they_are_convolutions_or_linear():
    """1×1 convolutions in SD1.5, linear in SDXL; 3×3 ones are flattened."""
    shapes = list_shapes("sd15")
    rows = {row.target: row for row in plan(lora("sd15", shapes), "sd15", "sdxl").rows("mapped")}
    into = rows["down_blocks.2.attentions.0.proj_in"]
    assert into.source == "down_blocks.2.attentions.0.proj_in" and into.shape == (1280, 1280)
    assert shapes[into.source] == (1280, 1280, 1, 1)
    assert rows["mid_block.resnets.0.conv1"].shape == (1280, 1280 * 9)


def test_skipped_and_refused_modules_say_why():
    reasons = list_reasons(plan(lora("sdxl"), "sdxl", "ssd-1b"), "skipped")
    assert set(reasons.values()) == {"the target has no such module"}
    reason, *_ = list_reasons(plan(lora("sd15"), "sd15", "sd21"), "refused").values()
    assert re.search(r"320×1024 on the target but 320×768 on the source", reason)


def test_students_that_renumber_their_blocks_are_not_matched_by_name():
    """BK-SDM's up_blocks.1.attentions.1 was made from the teacher's attentions.2."""
    module = "up_blocks.1.attentions.{}.transformer_blocks.0.attn1.to_q"
    one, two = (module.format(i) for i in (1, 2))
    assert (two, one) in list_pairs(plan(lora("sd15"), "sd15", "bk-sdm-base"))
    back = dict(list_pairs(plan(lora("bk-sdm-base"), "bk-sdm-base", "sd15")))
    assert back[one] == two and one not in back.values()


@pytest.mark.parametrize(
    "source, target", [("sdxl", "flux1-dev"), ("sd15", "sd3-medium"), ("flux1-dev", "sdxl")]
)
def test_other_kinds_of_model_are_named_and_a_fit_is_offered(source, target):
    with pytest.raises(UnsupportedFormat, match="different kinds of model") as why:
        plan(lora(source), source, target)
    titles = [known_families()[base(id_).family].title for id_ in (source, target)]
    assert f"({titles[0]} and {titles[1]})" in str(why.value) and "`fit()`" in str(why.value)
    assert len(str(why.value).split()) < 55 and "train the LoRA" not in str(why.value)


def test_an_unknown_architecture_is_described():
    """Instead of guessed at."""
    unknown = open_base({f"transformer_blocks.{i}.attn.to_q": torch.ones(8, 8) for i in range(3)})
    said = "a transformer with 3 transformer blocks \\(3 in transformer_blocks\\) of width 8"
    with pytest.raises(UnsupportedFormat, match=said):
        plan(lora("sdxl"), "sdxl", unknown)


def test_known_layouts_without_a_rule_are_refused_and_the_message_offers_a_map():
    with pytest.raises(UnsupportedFormat, match="by their weights"):
        plan(lora("sd21"), "sd21", "bk-sdm-base", match="name")


def test_an_update_that_does_not_fit_its_module_names_both_shapes_and_the_tensor():
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    wrong = Adapter({name: LowRank(torch.ones(640, 2), torch.ones(2, 639))})
    with pytest.raises(ShapeMismatch, match=re.escape(name) + ".*640×639.*640×640"):
        plan(wrong, "sdxl", "ssd-1b")


@pytest.mark.parametrize(
    "layout, module, shape",
    [("flux1-dev", "x_embedder", (3072, 128)), ("sd15", "conv_in", (320, 9 * 9))],
)
def test_a_lora_that_takes_a_second_image_is_named(layout, module, shape):
    adapter = lora(layout)
    adapter.updates[module] = LowRank(torch.zeros(shape[0], 4), torch.zeros(4, shape[1]))
    with pytest.raises(ShapeMismatch, match=r"LoRA for control, editing or inpainting.*the source"):
        plan(adapter, layout, layout, again=True)


def test_a_plan_where_every_width_differs_is_refused():
    with pytest.raises(ShapeMismatch, match="no module of this LoRA fits"):
        plan(lora("sd15", list_shapes("sd15", r"attn2\.to_k$")), "sd15", "sd21")


def test_a_users_map_replaces_the_rule_and_may_feed_one_source_to_several_targets(tmp_path):
    source = open_base({"a": torch.ones(4, 3), "b": torch.ones(4, 3)})
    target = open_base({"x": torch.ones(4, 3), "y": torch.ones(4, 3), "z": torch.ones(5, 3)})
    adapter = Adapter({n: LowRank(torch.ones(4, 1), torch.ones(1, 3)) for n in "ab"})
    table = {"x": "a", "y": "a", "z": "a"}
    file = tmp_path / "map.json"
    file.write_text(json.dumps(table))
    for match in (table, file, str(file)):
        report = plan(adapter, source, target, match=match)
        assert list_pairs(report) == [("a", "x"), ("a", "y")]
        assert set(list_reasons(report, "skipped")) == {"b"} and not report.totals["refused"]
        moved = prolora.transfer(adapter, source, target, match=match, method="copy").report
        assert moved.totals["energy_mapped"] == 0.5  # of a and b, though a is there twice
    with pytest.raises(UnsupportedFormat, match="lacks, the first: q"):
        plan(adapter, source, target, match={"q": "a"})
    with pytest.raises(UnsupportedFormat, match="neither"):
        plan(adapter, source, target, match="no-such-file.json")


TEXT = "{}.text_model.encoder.layers.0.self_attn.q_proj"


def with_text(layout, *encoders, module=None):
    """A LoRA on one attention module and on the named text encoders."""
    adapter = lora(layout, [module] if module else load_layout(layout).attention[:1])
    for encoder in encoders:
        adapter.updates[TEXT.format(encoder)] = LowRank(torch.ones(8, 1), torch.ones(1, 8))
    return adapter


def test_text_encoders_go_over_where_the_target_has_the_same_and_unless_they_are_left_out():
    """SD1.5 has SDXL's first one, SD2.1 another one of the same name."""
    one, two = (TEXT.format(name) for name in ("text_encoder", "text_encoder_2"))
    module = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    both = with_text("sdxl", "text_encoder", "text_encoder_2", module=module)
    report = plan(both, "sdxl", "sd15")
    assert (one, one) in list_pairs(report) and report.totals["mapped"] == 2
    reason = list_reasons(report, "skipped")[two]
    assert "no text encoder where the source has clip-bigg" in reason
    reasons = list_reasons(plan(both, "sdxl", "sd15", text_encoder="skip"), "skipped")
    assert "as asked" in reasons[one]
    reasons = list_reasons(plan(with_text("sd15", "text_encoder"), "sd15", "sd21"), "skipped")
    assert "clip-h where the source has clip-l" in reasons[one]


def test_text_encoders_are_projected_where_both_bases_hold_them():
    name, module = TEXT.format("text_encoder"), "down_blocks.0.attentions.0.proj_in"
    unet, generator = {module: torch.eye(4)}, torch.Generator().manual_seed(0)
    source, target = ({**unet, name: torch.randn(8, 8, generator=generator)} for _ in range(2))
    update = LowRank(torch.ones(8, 1), torch.ones(1, 8))
    adapter = Adapter({name: update, module: LowRank(torch.ones(4, 1), torch.ones(1, 4))})
    asked = {"text_encoder": "project"}
    report = plan(adapter, source, target, **asked)
    assert list_pairs(report) == [(module, module), (name, name)]
    reasons = list_reasons(plan(adapter, source, unet, **asked), "refused")
    assert "cannot be projected" in reasons[name]


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
