"""Bases whose owner has the weights: requested singly, of numpy, or without any values."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from checkpoints import fused_shapes
from lora_files import pair

import prolora
from prolora.architectures.layouts import load_layout
from prolora.errors import InvalidOption, ShapeMismatch, UnsupportedFormat, UnsupportedTensor

NAMES = [
    f"down_blocks.{block}.attentions.0.transformer_blocks.{number}.attn1.to_{leaf}"
    for block in (1, 2)
    for number in range(10)
    for leaf in "qkv"
]


@pytest.fixture(scope="module")
def case():
    """A LoRA on 6 of 60 weights, a source and a fine-tune of it."""
    generator = torch.Generator().manual_seed(0)
    source = {name: torch.randn(64, 48, generator=generator) for name in NAMES}
    noise = (0.05 * torch.randn(64, 48, generator=generator) for _ in NAMES)
    target = {name: weight + next(noise) for name, weight in source.items()}
    lora = {}
    for name in NAMES[:6]:
        lora[f"unet.{name}.lora_A.weight"] = 0.1 * torch.randn(4, 48, generator=generator)
        lora[f"unet.{name}.lora_B.weight"] = 0.1 * torch.randn(64, 4, generator=generator)
    return lora, source, target


def same_tensors(one: prolora.Transfer, other: prolora.Transfer) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class Counting(Mapping):
    """A mapping that reads a weight when it is requested, and notes which."""

    def __init__(self, weights):
        self.weights, self.requested = weights, []

    def __getitem__(self, key):
        self.requested.append(key)
        return self.weights[key]

    def __iter__(self):
        return iter(self.weights)

    def __len__(self):
        return len(self.weights)


def count_layout(size):
    """A published model as such a mapping, FLUX.1 in its authors' names."""
    shapes, start = load_layout(size).shapes, ""
    if size.startswith("flux"):
        shapes, start = fused_shapes(shapes, size), "model.diffusion_model."
    one = torch.ones(1)
    return Counting({f"{start}{name}.weight": one.expand(s) for name, s in shapes.items()})


@pytest.mark.parametrize("method", ["auto", "prolora"])
def test_of_sixty_weights_only_the_six_that_the_lora_changes_are_requested(case, method):
    lora, *models = case
    owners = [Counting(weights) for weights in models]
    bases = [
        prolora.open_base({key: x.shape for key, x in one.weights.items()}, read=one.__getitem__)
        for one in owners
    ]
    planned = prolora.transfer(lora, *bases, dry_run=True)
    assert not owners[0].requested + owners[1].requested and len(planned.report.modules) == 6
    moved = prolora.transfer(lora, *bases, method=method)
    assert all(set(one.requested) == set(NAMES[:6]) for one in owners)
    assert same_tensors(moved, prolora.transfer(lora, *models, method=method))


def test_of_a_mapping_without_shapes_the_modules_of_the_lora_are_read_alone(case):
    lora, *models = case
    bases = [Counting(weights) for weights in models]
    moved = prolora.transfer(lora, *bases, method="prolora")
    assert same_tensors(moved, prolora.transfer(lora, *models, method="prolora"))
    prolora.check(lora, base=bases[0])
    prolora.convert(lora, bases[0])
    prolora.merge([lora, lora], bases[1])
    for base in bases:
        assert set(base.requested) == set(NAMES[:6])


def test_the_names_of_a_mapping_tell_its_published_size_without_its_weights():
    names = [f"down_blocks.2.attentions.0.transformer_blocks.{i}.attn1.to_q" for i in range(6)]
    lora = {}
    for name in names:
        lora |= pair(f"unet.{name}", (1280, 1280), 2, ends=("lora_B", "lora_A"))
    bases = [count_layout(size) for size in ("sdxl", "ssd-1b")]
    moved = prolora.transfer(lora, *bases, method="copy")
    assert moved.report.match.startswith("sdxl to ssd-1b") and len(moved.adapter.updates) == 4
    assert [len(set(base.requested)) for base in bases] == [6, 4]
    base, path = count_layout("flux1-dev"), "diffusion_model.double_blocks.0.img_attn.qkv"
    lora = pair(path, (9216, 3072), 2, ends=("lora_B", "lora_A"))
    assert prolora.check(lora, base=base).base_match.base_title == "FLUX.1"
    assert base.requested == [f"model.{path}.weight"]


def make_kind(kind: str, tensors):
    return {key: x.numpy() if kind == "numpy" else x for key, x in tensors.items()}


FACTORS = [f"unet.{NAMES[0]}.lora_{side}.weight" for side in "BA"]


def project_pair(lora, one, other):
    pair = tuple(lora[key] for key in FACTORS)
    return dict(zip(FACTORS, prolora.project(pair, one[NAMES[0]], other[NAMES[0]]), strict=True))


VERBS = {
    "transfer": lambda *given: prolora.transfer(*given, method="prolora").state_dict(),
    "convert": lambda lora, one, _: prolora.convert(lora, one, out_rank=2).state_dict(),
    "merge": lambda lora, one, _: prolora.merge([lora, lora], one).state_dict(),
    "extract": lambda _, *bases: prolora.extract(*bases, out_rank=4).state_dict(),
    "bake": lambda lora, one, _: prolora.bake([lora], one).tensors,
    "project a pair": project_pair,
}


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_takes_and_returns_arrays_of_one_kind(case, verb, kind):
    given = [make_kind(kind, tensors) for tensors in case]
    made, wanted = VERBS[verb](*given), VERBS[verb](*case)
    assert {type(x) for x in made.values()} == {np.ndarray if kind == "numpy" else torch.Tensor}
    assert made.keys() == wanted.keys()
    assert all(np.array_equal(made[key], wanted[key]) for key in made)
    assert prolora.check(given[0], base=given[1]).base_match.coverage == 1


@pytest.mark.parametrize(
    "path", ["x.to_q", "unet.x.to_q", "diffusion_model.x.to_q", "lora_unet_x_to_q"]
)
def test_the_names_of_a_base_in_memory_are_modules(case, path):
    lora, source, target = case
    up, down = (lora[f"unet.{NAMES[0]}.lora_{side}.weight"] for side in "BA")
    update = {f"{path}.lora_up.weight": up, f"{path}.lora_down.weight": down}
    bases = {"x.to_q": source[NAMES[0]]}, {"x.to_q": target[NAMES[0]]}
    moved = prolora.transfer(update, *bases, method="copy")
    assert torch.equal(moved.adapter.updates["x.to_q"].dense(), up @ down)
    assert all(key.startswith(path) for key in moved.state_dict())


def test_a_base_on_the_meta_device_is_enough_for_a_dry_run_and_for_nothing_else(case):
    lora, source, target = case
    empty = [{k: x.to("meta") for k, x in model.items()} for model in (source, target)]
    assert len(prolora.transfer(lora, *empty, dry_run=True).report.modules) == 6
    with pytest.raises(UnsupportedFormat, match=r"no values .*open_base\(names_and_shapes, read"):
        prolora.transfer(lora, *empty)
    filled = prolora.open_base(empty[0], read=source.__getitem__)
    assert torch.equal(filled.read(NAMES[0]), source[NAMES[0]])
    shapes = {NAMES[0]: torch.empty(64, 48, device="meta", dtype=torch.half)}
    half = prolora.open_base(shapes, read=source.__getitem__)
    assert torch.equal(half.read(NAMES[0]), source[NAMES[0]].half())


def test_a_promise_that_is_not_kept_is_refused_by_name(case):
    _, source, _ = case
    wrong = prolora.open_base({NAMES[0]: (48, 64)}, read=source.__getitem__)
    with pytest.raises(ShapeMismatch, match=rf"{NAMES[0]}.*\[64, 48\], not \[48, 64\]"):
        wrong.read(NAMES[0])
    with pytest.raises(ShapeMismatch, match="is not the shape of a weight"):
        prolora.open_base({NAMES[0]: (48, "64")}, read=source.__getitem__)
    with pytest.raises(InvalidOption, match="`read` needs a mapping"):
        prolora.open_base("folder", read=source.__getitem__)
    with pytest.raises(UnsupportedFormat, match=r"open_base\(names_and_shapes, read"):
        prolora.open_base({NAMES[0]: 64})


def test_slips_of_the_hand_are_guessed(case):
    lora, source, target = case
    up, down = (lora[f"unet.{NAMES[0]}.lora_{side}.weight"] for side in "BA")
    weights = source[NAMES[0]], target[NAMES[0]]
    moved = prolora.project((up, down), *weights, rank=16)
    first, second = moved
    assert first is moved.up and second is moved.down
    with pytest.raises(ShapeMismatch, match="given in the other order"):
        prolora.project((down, up), *weights)
    square = torch.eye(64)
    with pytest.raises(ShapeMismatch, match="in the other order"):
        prolora.project((up.mT, up), square, square)
    with pytest.raises(UnsupportedTensor, match=r"give its \.weight"):
        prolora.project((up, down), torch.nn.Linear(48, 64), weights[1])


def test_a_transposed_convolution_of_a_module_is_left_out():
    layers = {"to_q": torch.nn.Linear(4, 6), "up": torch.nn.ConvTranspose2d(4, 6, 2)}
    assert prolora.open_base(torch.nn.ModuleDict(layers)).shapes == {"to_q": (6, 4)}
