"""The 38 crossings that the largest platform of models admits: what becomes of a LoRA in each.

Small models stand for the published ones, with their names, proportions and two blocks. A target
has the source's weights wherever both have a matrix of one shape, trained on until they drifted.
"""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from family_loras import is_early, measure_difference
from small_models import authors_weights, small_shapes, small_weights

import prolora
from prolora import Adapter, LowRank, errors
from prolora.adapters import encode_state_dict, read_adapter
from prolora.architectures.identify import Model

SDXL = ["SDXL", "Pony", "Illustrious", "NoobAI"]
WAN_21 = {
    "Wan 2.1 T2V 14B": "wan-t2v-14b",
    "Wan 2.1 I2V 14B 480p": "wan2.1-i2v-14b",
    "Wan 2.1 I2V 14B 720p": "wan2.1-i2v-14b",
}
WAN_22 = {
    "Wan 2.2 T2V A14B": "wan-t2v-14b",
    "Wan 2.2 I2V A14B": "wan2.2-i2v-14b",
    "Wan 2.2 TI2V 5B": "wan2.2-ti2v-5b",
}
WAN = WAN_21 | WAN_22
I2V_21 = [name for name, layout in WAN.items() if layout == "wan2.1-i2v-14b"]
WAN_PAIRS = [
    *itertools.product(WAN_21, WAN_22),
    *itertools.product(WAN_22, WAN_21),
    *itertools.permutations(I2V_21),
]
CROSSINGS = [
    *(("sdxl", one, other, "sdxl", "sdxl") for one, other in itertools.permutations(SDXL, 2)),
    ("flux", "FLUX.1 [dev]", "FLUX.1 Krea", "flux1-dev", "flux1-dev"),
    ("flux", "FLUX.1 Krea", "FLUX.1 [dev]", "flux1-dev", "flux1-dev"),
    *(("wan", one, other, WAN[one], WAN[other]) for one, other in WAN_PAIRS),
    ("z-image", "Z-Image", "Z-Image Turbo", "z-image", "z-image"),
    *(
        ("flux2", f"klein {size}-base", f"klein {size}", f"flux2-klein-{size.lower()}", None)
        for size in ("4B", "9B")
    ),
    ("auraflow", "AuraFlow", "Pony V7", "auraflow", "auraflow"),
]
TRAINED = re.compile(r"attn|attention|\bff|ffn|mlp|feed_forward")
IMAGES = re.compile(r"\.add_[kv]_proj$")
OTHER_WIDTH = "ti2v-5b"
DRIFT = 0.05


def make_bases(source, target, names, family):
    """The weights of both, the target's drifted from the source's where they have one shape."""
    old, new = small_weights(source), small_weights(target, seed=1)
    noise = torch.Generator().manual_seed(2)
    for name, weight in new.items():
        if name in old and old[name].shape == weight.shape:
            change = torch.randn(weight.shape, generator=noise) / weight.shape[1] ** 0.5
            new[name] = old[name] + DRIFT * change
    if names == "authors":
        old, new = authors_weights(family, old), authors_weights(family, new)
    return tuple({f"{name}.weight": w for name, w in part.items()} for part in (old, new))


def make_lora(family, layout):
    """A file in ComfyUI's spelling, of rank 2, on attention and feed-forward."""
    generator, updates = torch.Generator().manual_seed(3), {}
    for name, (out, inputs) in small_shapes(layout).items():
        if is_early(name) and TRAINED.search(name):
            up = torch.randn(out, 2, generator=generator)
            updates[name] = LowRank(up, torch.randn(2, inputs, generator=generator))
    return read_adapter(
        encode_state_dict(Adapter(updates, origin=Model.of(family)), format="comfy")
    )


def cross(family, source, target, method, names="diffusers"):
    """The LoRA, and what becomes of it."""
    lora = make_lora(family, source)
    old, new = make_bases(source, target, names, family)
    return lora, prolora.transfer(lora, old, new, method=method)


# Each pair of layouts once; the weights have names of diffusers and of authors in turn.
PAIRS = list(dict.fromkeys((family, a, b or a) for family, _, _, a, b in CROSSINGS))
CASES = [(*pair, ("diffusers", "authors")[i % 2]) for i, pair in enumerate(PAIRS)]
FITTING = [case for case in CASES if (OTHER_WIDTH in case[1]) == (OTHER_WIDTH in case[2])]
# Wan 2.1 I2V alone has more modules; the others differ in their names, which have tests.
SHORT = [case for case in FITTING if "wan2.1-i2v-14b" in case[1:3] and case[1] != case[2]]


def test_the_platform_admits_thirty_eight():
    assert len(CROSSINGS) == len(set(CROSSINGS)) == 38


@pytest.mark.parametrize(
    ("family", "source", "target", "names"),
    [pytest.param(*x, marks=() if x in SHORT else pytest.mark.slow) for x in FITTING],
)
def test_a_lora_crosses_with_all_modules_that_the_target_has(family, source, target, names):
    lora, result = cross(family, source, target, "auto", names)
    lost = {name for name in lora.updates if name not in small_shapes(target)}
    # Only Wan 2.1 I2V has keys and values of the first picture.
    assert bool(lost) == (source != target and source == "wan2.1-i2v-14b")
    assert all(IMAGES.search(name) for name in lost)
    assert result.adapter.updates.keys() == lora.updates.keys() - lost
    assert result.report.coverage == pytest.approx(1 - len(lost) / len(lora.updates))
    reasons = {row.source: row.reason for row in result.report.modules if row.target is None}
    assert reasons.keys() == lost
    assert all("target" in reason for reason in reasons.values())
    assert result.report.verdict is None or result.report.verdict.related
    if result.report.method == "copy":
        for name, update in result.adapter.updates.items():
            assert measure_difference(update, lora.updates[name]) < 1e-6, name
    written = result.state_dict()
    assert all(key.startswith("diffusion_model.") for key in written)
    assert prolora.convert(written).adapter.updates.keys() == result.adapter.updates.keys()


@pytest.mark.parametrize(
    ("family", "source", "target", "names"), [case for case in CASES if case not in FITTING]
)
def test_no_lora_crosses_between_models_of_other_widths(family, source, target, names):
    with pytest.raises(errors.ShapeMismatch, match="no module of this LoRA fits the target"):
        cross(family, source, target, "auto", names)
