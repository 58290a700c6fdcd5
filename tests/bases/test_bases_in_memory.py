"""Bases whose owner has the weights: requested singly, of numpy, or without any values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import prolora
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


@pytest.mark.parametrize("method", ["auto", "prolora"])
def test_of_sixty_weights_only_the_six_that_the_lora_changes_are_requested(case, method):
    lora, *models = case
    requested: list[str] = []

    def open_counting(weights):
        return prolora.open_base(
            {name: weight.shape for name, weight in weights.items()},
            read=lambda name: requested.append(name) or weights[name],
        )

    bases = [open_counting(weights) for weights in models]
    planned = prolora.transfer(lora, *bases, dry_run=True)
    assert requested == [] and len(planned.report.modules) == 6
    moved = prolora.transfer(lora, *bases, method=method)
    assert sorted(set(requested)) == sorted(NAMES[:6])
    assert same_tensors(moved, prolora.transfer(lora, *models, method=method))


def test_numpy_arrays_are_a_base_as_tensors_are(case):
    lora, *models = case
    arrays = [{name: weight.numpy() for name, weight in weights.items()} for weights in models]
    moved = prolora.transfer(lora, *arrays, method="prolora")
    assert same_tensors(moved, prolora.transfer(lora, *models, method="prolora"))
    requested = [
        prolora.open_base({k: x.shape for k, x in some.items()}, read=some.__getitem__)
        for some in arrays
    ]
    assert same_tensors(moved, prolora.transfer(lora, *requested, method="prolora"))


def test_a_base_on_the_meta_device_is_enough_for_a_dry_run_and_for_nothing_else(case):
    lora, source, target = case
    empty = [{k: x.to("meta") for k, x in model.items()} for model in (source, target)]
    assert len(prolora.transfer(lora, *empty, dry_run=True).report.modules) == 6
    with pytest.raises(UnsupportedFormat, match=r"no values .*open_base\(names_and_shapes, read"):
        prolora.transfer(lora, *empty)
    filled = prolora.open_base(empty[0], read=source.__getitem__)
    assert torch.equal(filled.read(NAMES[0]), source[NAMES[0]])
    half = prolora.open_base({NAMES[0]: torch.empty(64, 48, device="meta", dtype=torch.half)},
                             read=source.__getitem__)  # fmt: skip
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
    with pytest.raises(UnsupportedTensor, match=r"give its \.weight"):
        prolora.project((up, down), torch.nn.Linear(48, 64), weights[1])
    arrays = prolora.project((up.numpy(), down.numpy()), *(w.numpy() for w in weights), rank=16)
    assert np.array_equal(arrays.up.numpy(), moved.up.numpy())
