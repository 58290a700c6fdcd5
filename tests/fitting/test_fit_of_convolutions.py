"""Convolutions are fitted as the linear layers on patches that they are."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import SanaTransformer2DModel
from fitting import FlowSide, fit_models, predict, solve, teach
from torch import Tensor, nn
from torch.nn import functional

from prolora import LowRank
from prolora import fitting as probe
from prolora.architectures.modules import matrix_shape, may_be_fitted
from prolora.fitting.gate import Gate

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "of single places": {"kernel_size": 1},
    "padded": {"kernel_size": 3, "padding": 1},
    "striding": {"kernel_size": (3, 2), "padding": (1, 0), "stride": 2},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "same": {"kernel_size": 3, "padding": "same"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
}


class OfPatches(nn.Module):
    """The same function as a convolution, by a linear layer on its patches."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        weight = convolution.weight.detach().flatten(1)
        self.linear = nn.Linear(weight.shape[1], len(weight))
        assert convolution.bias is not None
        self.linear.load_state_dict({"weight": weight, "bias": convolution.bias.detach()})
        self.options = convolution

    def forward(self, x: Tensor) -> Tensor:
        options: Any = self.options
        size = options(x).shape[2:]
        if options.padding_mode == "circular":
            x = functional.pad(x, (1, 1, 1, 1), "circular")
            padding: Any = 0
        else:
            padding = 1 if options.padding == "same" else options.padding
        how = options.kernel_size, options.dilation, padding, options.stride
        rows = functional.unfold(x, *how).mT
        return self.linear(rows).mT.unflatten(2, size)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_gets_the_update_that_a_linear_layer_on_its_patches_gets(kind: str):
    torch.manual_seed(0)
    one, last = nn.Conv2d(3, 4, **CONVOLUTIONS[kind]), nn.Conv2d(4, 2, 1)
    whole = nn.Sequential(one, nn.SiLU(), last)
    twin = nn.Sequential(OfPatches(one), nn.SiLU(), last)
    changed = copy.deepcopy(whole)
    x = torch.randn(6, 3, 6, 7)
    changed[0].weight.data += 0.1 * torch.randn(one.weight.shape)
    probes = teach(whole, x, predict(changed, x) - predict(whole, x))
    torch.testing.assert_close(predict(twin, x), probes[0].plain)
    ours = solve(whole, ["0"], probes, 4, 0.1)
    theirs = solve(twin, ["0.linear"], probes, 4, 0.1)
    torch.testing.assert_close(ours.history, theirs.history, atol=1e-3, rtol=0)
    assert ours.history[-1] > 0.5
    found, wanted = ours.updates["0"].dense(), theirs.updates["0.linear"].dense()
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-2)


def make_sana() -> SanaTransformer2DModel:
    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
    )


def test_sana_s_convolutions_are_fitted_and_its_depthwise_ones_are_not():
    torch.manual_seed(0)
    source, target = make_sana(), make_sana()
    roles = "attn1.to_q", "ff.conv_inverted", "ff.conv_depth", "ff.conv_point"
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in source.named_modules()
        if name.endswith(roles)
    }
    lora = {
        name: LowRank(torch.randn(m, 2) / 4, torch.randn(2, n) / n**0.5)
        for name, (m, n) in ((name, matrix_shape(shape)) for name, shape in shapes.items())
    }

    class SanaSide(FlowSide):
        def build_call(self, state: Tensor, level: Tensor, *_: Any) -> probe.Call:
            prompt = torch.ones(len(state), 5, 8)
            time = 1000 * self.schedule.time_at(level).float()
            return probe.Call((state,), {"encoder_hidden_states": prompt, "timestep": time})

    few = {"images": 4, "fit_steps": 3, "rank": 2, "force": True}
    sides = (SanaSide(model, (4, 8, 8)) for model in (source, target))
    moved = fit_models(*sides, lora, **few)
    assert set(moved.updates) == {name for name in lora if "depth" not in name}
    assert set(moved.report.left_out) == set(lora) - set(moved.updates)
    assert all("a fit cannot change" in reason for reason in moved.report.left_out.values())
    # What is foreseen without the models, from shapes alone, is the same.
    assert {name for name in lora if may_be_fitted(shapes[name])} == set(moved.updates)


def test_a_raised_strength_is_told_with_what_to_do():
    raised = Gate("go", 1.25, {"all": 0.6}, {"all": 0.1}, "60% reached")
    report = probe.ProbeReport(rank=4, gate=raised)
    assert "go, at strength 1.25: 60% reached." in report.sentences()
    assert "Load it at 1" in report.sentences()[-1]
    copied = replace(raised, decision="copy", copy_strength=0.75)
    assert "copy, at strength 0.75" in replace(report, gate=copied).sentences()[-1]
