"""Architectures are recognised by their weights, and blocks find the blocks they came from."""

import pytest

from prolora.architectures import layouts
from prolora.architectures.identify import identify_base
from prolora.architectures.modules import have_equal_shapes


def find_layout(shapes):
    return next(iter(identify_base(shapes).sizes), None)


# Modules of attention, and of feed-forward.
COUNTS = {"sd15": (128, 32), "sd21": (128, 32), "sdxl": (560, 140), "ssd-1b": (272, 68)}
COUNTS |= {"segmind-vega": (120, 30), "koala-1b": (240, 60), "koala-700m": (168, 42)}
COUNTS |= {"bk-sdm-base": (80, 20), "bk-sdm-small": (72, 18), "bk-sdm-tiny": (72, 18)}
COUNTS |= {"flux1-dev": (266, 152), "flux1-schnell": (266, 152), "flux1-fill": (266, 152)}
COUNTS |= {"sd3-medium": (191, 94), "sd3.5-medium": (243, 94), "sd3.5-large": (303, 150)}
COUNTS |= {"pixart-alpha": (224, 56), "pixart-sigma": (224, 56)}
COUNTS |= {"longcat-image": (10 * 8 + 20 * 3, 10 * 4 + 20 * 2)}
ATTENTION = {id_: attention for id_, (attention, _) in COUNTS.items()}
# Where names do not tell attention and feed-forward apart: all matrices of the blocks.
IN_BLOCKS = {
    "ace-step-1.5": 24 * 11,
    "auraflow": 4 * 16 + 32 * 8,
    "boogu-image": 8 * (1 + 8 + 4 + 2 * 3 + 5) + 32 * 8 + 2 * 8 + 2 * 8 + 2 * 7,
    "chroma": 19 * 12 + 38 * 5 + 5 * 2,
    "chroma-radiance": 19 * 12 + 38 * 5 + 5 * 2 + 4,
    "hidream-o1": 36 * 7 + 27 * 4,
    "hidream-i1": 16 * (9 + 15 + 3) + 32 * (5 + 15) + 49,
    "krea2": 28 * 8 + 4 * 8,
    "llada-image": 30 * 8 + 2 * 8 + 2 * 7 + 2 * 7,
    "lumina2": 26 * 8 + 2 * 8 + 2 * 7,
    "omnigen2": 32 * 8 + 2 * 8 + 2 * 8 + 2 * 7,
    "qwen-image-2.1": 32 * 7,
    "flux2-dev": 8 * 12 + 48 * 2,
    "flux2-klein-9b": 8 * 12 + 24 * 2,
    "flux2-klein-4b": 5 * 12 + 20 * 2,
    "mageflow": 12 * 14,
    "qwen-image": 60 * 14,
    "z-image": 30 * 8 + 2 * 8 + 2 * 7,
}
ENCODE_TEXT_THEMSELVES = ("hidream-o1",)
# Layouts that another one shares all its blocks with.
FLUX_TWINS = ("flux1-dev", "flux1-schnell", "flux1-fill", "chroma", "chroma-radiance")
TWINS = (*FLUX_TWINS, "pixart-alpha", "pixart-sigma", "llada-image")
# What a target has of a source's attention: (modules, those of the same shape) -> pairs of both.
MAPPED = {
    (88, 66): "sd15 sdxl, sdxl sd15",
    (128, 96): "sd15 sd21",
    (72, 72): "sd15 bk-sdm-small, sd15 bk-sdm-tiny",
    (80, 80): "sd15 bk-sdm-base",
    (120, 120): "sdxl segmind-vega, ssd-1b segmind-vega",
    (272, 272): "sdxl ssd-1b",
    (240, 240): "sdxl koala-1b, wan-t2v-1.3b wan2.1-vace-1.3b",
    (191, 191): "sd3-medium sd3.5-medium",
    (440, 440): "hunyuan-video-1.5 hunyuan-video-1.5-step-distilled",
    (400, 400): "wan2.1-i2v-14b wan2.1-flf2v-14b",
    (160, 160): "sana-1.6b sana-sprint-1.6b",
    (172, 172): "flux3-klein flux3-klein-distilled",
    (0, 0): "kandinsky5-image-lite kandinsky5-image-lite-edit",
    (1152, 1152): "ltx2 ltx2.3, ltx2 ltx2.5, ltx2.3 ltx2.5",
    (266, 266): "flux1-dev flux1-schnell, flux1-dev flux1-fill, flux1-schnell flux1-fill, "
    "flux1-dev chroma, flux1-schnell chroma, flux1-fill chroma, chroma chroma-radiance",
    (168, 168): "sdxl koala-700m, koala-1b koala-700m, cogvideox-5b cogvideox-5b-i2v, "
    "cogvideox-5b cogvideox1.5-5b, cogvideox-5b cogvideox1.5-5b-i2v, "
    "cogvideox-5b-i2v cogvideox1.5-5b, cogvideox-5b-i2v cogvideox1.5-5b-i2v, "
    "cogvideox1.5-5b cogvideox1.5-5b-i2v",
    (320, 320): "wan-t2v-14b wan2.1-vace-14b, wan2.2-i2v-14b wan2.1-vace-14b, "
    "wan2.1-i2v-14b wan2.1-vace-14b, wan2.1-flf2v-14b wan2.1-vace-14b, "
    "wan-t2v-14b wan2.2-i2v-14b, wan-t2v-14b wan2.1-i2v-14b, wan-t2v-14b wan2.1-flf2v-14b, "
    "wan2.2-i2v-14b wan2.1-i2v-14b, wan2.2-i2v-14b wan2.1-flf2v-14b, anima-2.9b anima-3.8b",
    (288, 288): "cosmos-predict2-14b cosmos-predict2-14b-video, "
    "cosmos-predict2-14b cosmos-predict2.5-14b, cosmos-predict2-14b-video cosmos-predict2.5-14b, "
    "hunyuan-video hunyuan-video-i2v-33, hunyuan-video framepack, "
    "hunyuan-video-i2v-33 framepack, hunyuan-image hunyuan-image-distilled",
    (224, 224): "pixart-alpha pixart-sigma, sana-0.6b sana-sprint-0.6b, "
    "cosmos-predict2-2b anima, cosmos-predict2-2b cosmos-predict2-2b-video, "
    "cosmos-predict2-2b cosmos-predict2.5-2b, cosmos-predict2-2b-video cosmos-predict2.5-2b, "
    "anima anima-2.9b, anima anima-3.8b, cosmos-predict2-2b anima-2.9b, "
    "cosmos-predict2-2b anima-3.8b",
}
PAIRS = {
    tuple(pair.split()): count for count, pairs in MAPPED.items() for pair in pairs.split(", ")
}


def test_every_layout_has_the_published_number_of_attention_modules() -> None:
    for id_ in (*ATTENTION, *IN_BLOCKS):
        layout = layouts.load_layout(id_)
        assert bool(layout.unnamed_stacks) == (id_ in IN_BLOCKS)
        assert bool(layout.text_encoders) == (id_ not in ENCODE_TEXT_THEMSELVES)
        assert layout.id == id_ and layout.title
    assert {id_: len(layouts.load_layout(id_).attention) for id_ in ATTENTION} == ATTENTION
    for id_, counts in COUNTS.items():
        assert len(layouts.load_layout(id_).adapted) == sum(counts)
    assert {id_: len(layouts.load_layout(id_).adapted) for id_ in IN_BLOCKS} == IN_BLOCKS


@pytest.mark.parametrize("id_", ["sd9", "correspondence", "../layouts/sdxl"])
def test_an_unknown_layout_is_a_key_error_that_lists_the_known(id_):
    with pytest.raises(KeyError, match=r"known are .*bk-sdm-base"):
        layouts.load_layout(id_)


@pytest.mark.parametrize("id_", ATTENTION | IN_BLOCKS)
def test_a_checkpoint_is_recognised_by_its_attention_and_feed_forward(id_):
    """Whole, attention alone, with foreign parameters, with other spellings of 1×1."""
    known = layouts.load_layout(id_)
    shapes = dict(known.shapes)
    alone = None if id_ in TWINS else id_
    if id_ in ATTENTION:
        assert find_layout({n: shapes[n] for n in known.attention}) == alone
    assert find_layout({n: shapes[n] for n in known.adapted}) == alone
    conv = {n: (*s, 1, 1) if len(s) == 2 else s for n, s in shapes.items()}
    linear = {n: s[:2] if s[2:] == (1, 1) else s for n, s in shapes.items()}
    first = [name for name in ("conv_in", "pos_embed.proj") if name in shapes][:1]
    inpainting = shapes | {"control.zero": (5, 5)} | dict.fromkeys(first, (320, 9, 3, 3))
    for other in (shapes, conv, linear, inpainting):
        assert find_layout(other) == id_


@pytest.mark.parametrize("id_", ["sd15", "sdxl", "flux1-dev", "qwen-image", "z-image", "lumina2"])
def test_a_checkpoint_that_differs_in_one_adapted_weight_is_not_recognised(id_):
    """Missing, additional or of another shape; half a feed-forward is an incomplete file."""
    known = layouts.load_layout(id_)
    for name in (known.adapted[0], known.adapted[-1]):
        assert find_layout({n: s for n, s in known.shapes.items() if n != name}) is None
        assert find_layout({**known.shapes, name: (7, 7)}) is None
    extra = "down_blocks.1.attentions.0.transformer_blocks.99.attn1.to_q"
    text = "text_encoder.text_model.encoder.layers.0.self_attn.to_q"
    assert find_layout({**known.shapes, text: (640, 640)}) == id_
    assert find_layout({**known.shapes, extra: (640, 640)}) is find_layout({}) is None


def test_the_rules_map_as_many_modules_as_published():
    """Counted again here from rules and layouts; there are no other rules."""
    assert set(layouts._load_rules()) == set(PAIRS)
    for (source, target), counts in PAIRS.items():
        rule = layouts.find_correspondence(source, target)
        assert rule is not None and rule.evidence
        ours, theirs = layouts.load_layout(source), layouts.load_layout(target)
        mapped = {n: s for n in theirs.attention if (s := rule.source_of(n)) is not None}
        same = sum(ours.shapes[s] == theirs.shapes[n] for n, s in mapped.items())
        assert (len(mapped), same) == counts, (source, target)
        assert set(mapped.values()) <= set(ours.attention)


@pytest.mark.parametrize(
    ("source", "target", "module", "origin"),
    [
        # The student kept the last of three layers and calls it its second.
        ("sd15", "bk-sdm-base", "up_blocks.1.resnets.1.conv1", "up_blocks.1.resnets.2.conv1"),
        # Renumbered twice, once a step: block 0 is the teacher's 1 and not its 2.
        ("sd15", "bk-sdm-tiny", "up_blocks.0.resnets.1.conv1", "up_blocks.1.resnets.2.conv1"),
        ("sdxl", "sd15", "up_blocks.1.attentions.0.proj_in", "up_blocks.0.attentions.0.proj_in"),
        ("sdxl", "sd15", "down_blocks.0.attentions.0.proj_in", None),
        ("sdxl", "ssd-1b", "not.a.module", None),
    ],
)
def test_renumbered_blocks_find_their_origin(
    source: str, target: str, module: str, origin: str | None
):
    """Equal names would be wrong in every first case."""
    rule = layouts.find_correspondence(source, target)
    assert rule is not None and rule.source_of(module) == origin


@pytest.mark.parametrize(
    ("target", "numbers", "inserted"),
    [
        ("anima-2.9b", {0: 0, 1: 1, 2: 3, 14: 20, 27: 39}, range(2, 20, 3)),
        ("anima-3.8b", {0: 0, 1: 1, 2: 4, 14: 26, 27: 51}, range(3, 48, 4)),
    ],
)
def test_inserted_blocks_have_no_origin(target, numbers, inserted):
    """Every block of Anima is still there, in its order, under another number."""
    rule = layouts.find_correspondence("anima", target)
    assert rule is not None
    names = [n for n in layouts.load_layout(target).shapes if n.endswith(".attn1.to_q")]
    origins = [rule.source_of(name) for name in names]
    old_names = [f"transformer_blocks.{number}.attn1.to_q" for number in range(28)]
    assert [origin for origin in origins if origin is not None] == old_names
    assert all(origins[new] == old_names[old] for old, new in numbers.items())
    assert all(origins[number] is None for number in inserted)
    adapter = "llm_adapter.blocks.3.self_attn.q_proj"
    assert rule.source_of(adapter) == adapter


def test_twins_are_told_apart_by_what_lies_outside_their_blocks() -> None:
    """A relative of FLUX with the same blocks and another embedding of time is not FLUX."""
    dev = layouts.load_layout("flux1-dev").shapes
    embedders = [name for name in dev if "guidance_embedder" in name]
    assert len(embedders) == 2
    schnell = {name: shape for name, shape in dev.items() if name not in embedders}
    assert find_layout(schnell) == "flux1-schnell"
    assert find_layout({**schnell, embedders[0]: dev[embedders[0]]}) is None
    pruned = {name: shape for name, shape in schnell.items() if "time_text_embed" not in name}
    assert find_layout(pruned) is None
    # Fill and the control models have a wider first layer, and only that of Fill is known.
    for width, id_ in ((64, "flux1-dev"), (384, "flux1-fill"), (128, "flux1-dev")):
        assert find_layout({**dev, "x_embedder": (3072, width)}) == id_


@pytest.mark.parametrize(
    "ours, theirs, equal",
    [
        ((16, 72), (16, 72, 1, 1), True),
        ((16, 8, 3, 3), (16, 8, 3, 3), True),
        ((16, 8, 3, 3), (16, 72, 1, 1), False),
        ((16, 8, 3, 3), (16, 72), False),
        ((16, 24, 1, 3), (16, 24, 3, 1), False),
        ((16, 8), (8, 16), False),
    ],
)
def test_kernels_of_two_shapes_and_one_size_are_different_shapes(ours, theirs, equal) -> None:
    assert have_equal_shapes(ours, theirs) == have_equal_shapes(theirs, ours) == equal
