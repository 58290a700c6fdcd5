"""Models stored in half precision give what their float32 copies give."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from test_probe import lora, permuted, run, source
from test_probe_diffusers import UNET, loras
from torch import nn

from prolora.probe.precision import in_float32
from prolora.probe.recording.trajectories import Call, predict_call
from prolora.probe.updates import run_beside

__all__ = ["lora", "source"]  # fixtures


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_stored_models_are_probed_as_their_float32_copies(source, lora, dtype):
    target = permuted(source)
    halves = [model.to(dtype) for model in (source, target)]
    before = [copy.deepcopy(model.state_dict()) for model in halves]
    wide = [copy.deepcopy(model).float() for model in halves]
    few = {"fit_steps": 3, "force": True}
    halved, wanted = run(*halves, lora, **few), run(*wide, lora, **few)
    assert halved.report.gate == wanted.report.gate
    for name, update in halved.adapter.updates.items():
        assert torch.equal(update.dense(), wanted.adapter.updates[name].dense())
    for model, kept in zip(halves, before, strict=True):
        for name, weight in model.state_dict().items():
            assert weight.dtype == dtype
            assert torch.equal(weight, kept[name])


def test_a_unet_in_half_precision_computes_in_float32():
    torch.manual_seed(0)
    half = UNet2DConditionModel(**UNET).bfloat16()
    wide = copy.deepcopy(half).float()
    x, text = torch.randn(2, 1, 8, 8), torch.randn(2, 3, 8)
    call = Call((x.bfloat16(), torch.tensor(500)), {"encoder_hidden_states": text.bfloat16()})
    same = Call(
        (x.bfloat16().float(), torch.tensor(500)),
        {"encoder_hidden_states": text.bfloat16().float()},
    )
    update = loras(wide, r".*attn1\.to_v")
    with in_float32(half), run_beside(half, update), run_beside(wide, update):
        assert torch.equal(predict_call(half, call), predict_call(wide, same))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_failing_pass_leaves_the_stored_weights_in_place():
    class Fails(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError("inside")

    model = nn.Sequential(Fails(3, 3)).half()
    weight = model[0].weight
    with in_float32(model), pytest.raises(KeyError):
        model(torch.ones(1, 3))
    assert model[0].weight is weight
    assert not model[0]._forward_pre_hooks
