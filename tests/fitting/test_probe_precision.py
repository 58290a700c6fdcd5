"""Models stored in half precision give what their float32 copies give."""

from __future__ import annotations

import copy

import pytest
import tiny_pipelines as tiny
import torch
from diagonal import keep_some
from fitting import fit_models, predict
from lora_files import same_bits
from small_diffusers import make_model
from test_probe import lora, permuted, source
from torch import nn

from prolora.fitting.models import in_float32, in_precision

__all__ = ["lora", "source"]  # fixtures


def test_half_stored_models_are_probed_as_their_float32_copies(source, lora):
    target = permuted(source)
    halves = [model.half() for model in (source, target)]
    before = [copy.deepcopy(model.state_dict()) for model in halves]
    wide = [copy.deepcopy(model).float() for model in halves]
    few = {"images": 4, "fit_steps": 3, "force": True}
    halved, wanted = fit_models(*halves, lora, **few), fit_models(*wide, lora, **few)
    assert halved.report.gate == wanted.report.gate
    assert same_bits(halved.scaled, wanted.scaled)
    for model, kept in zip(halves, before, strict=True):
        assert {weight.dtype for weight in model.state_dict().values()} == {torch.float16}
        assert same_bits(model.state_dict(), kept)


@pytest.mark.parametrize("kind", keep_some(["unet", "flux", "qwen"], "unet", "qwen"))
def test_a_model_of_diffusers_in_bfloat16_predicts_what_torchs_autocast_makes_of_it(kind):
    model, call = make_model(kind)
    update = tiny.updates(model, ("attn.to_v", "attn1.to_v"), size=0.1)
    assert update
    wide = predict(model, call, updates=update)
    with in_precision(model, "bfloat16"):
        narrow = predict(model, call, updates=update)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        oracle = predict(model, call, updates=update)
    assert narrow.dtype == torch.float32 and torch.equal(narrow, oracle.float())
    error = float((narrow - wide).norm() / wide.norm())
    assert 1e-4 < error < 5e-2
    # Stored in 16 bits, its products see the same numbers, and nothing else is rounded.
    model.bfloat16()
    with in_precision(model, "bfloat16"):
        stored = predict(model, call, updates=update)
    with in_float32(model):
        exact = predict(model, call, updates=update)
    assert stored.dtype == torch.float32
    assert float((stored - exact).norm() / exact.norm()) < 5e-2


@pytest.mark.parametrize("bits", ["float32", "bfloat16"])
def test_a_pass_that_fails_leaves_the_stored_weights_and_ends_autocast(bits):
    class Fails(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert torch.is_autocast_enabled("cpu") == (bits == "bfloat16")
            raise KeyError("inside")

    model = nn.Sequential(Fails(3, 3)).half()
    weight = model[0].weight
    with in_precision(model, bits), pytest.raises(KeyError):
        model(torch.ones(1, 3))
    assert model[0].weight is weight and not torch.is_autocast_enabled("cpu")
    assert not model[0]._forward_pre_hooks and not model._forward_pre_hooks


def test_a_whole_probing_in_16_bits_mixes_samples_and_reaches_what_float32_reaches(source, lora):
    target = permuted(source)
    few = {"images": 6, "fit_steps": 4, "force": True}
    shares = {}
    for bits in ("float32", "bfloat16"):
        fitted = fit_models(source, target, lora, **few, precision=bits)
        shares[bits] = fitted.report.gate.share["all"]
        factors = [x for update in fitted.updates.values() for x in (update.up, update.down)]
        assert {x.dtype for x in factors} == {torch.float32}
    assert shares["bfloat16"] == pytest.approx(shares["float32"], abs=0.05)
    assert shares["float32"] > 0.3
