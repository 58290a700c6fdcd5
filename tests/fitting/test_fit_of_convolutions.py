"""Convolutions are fitted as the linear layers on patches that they are."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import SanaTransformer2DModel
from fitting import FlowSide, fit_models
from torch import Tensor, nn
from torch.nn import functional

from prolora import LowRank
from prolora import fitting as probe
from prolora.architectures.modules import matrix_shape, may_be_fitted
from prolora.fitting.gate import Gate
from prolora.fitting.sides import Call
from prolora.fitting.solver.joint_fit import JointFit, JointProblem, fit_jointly
from prolora.fitting.solver.linearisation import ProbeBatch

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


def fit(model: nn.Module, name: str, probes: list[ProbeBatch]) -> JointFit:
    return fit_jointly(
        JointProblem(model, [name], lambda y: y, lambda: probes, 4, damping=0.1, rank=2)
    )


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_gets_the_update_that_a_linear_layer_on_its_patches_gets(kind: str):
    torch.manual_seed(0)
    one, last = nn.Conv2d(3, 4, **CONVOLUTIONS[kind]), nn.Conv2d(4, 2, 1)
    whole = nn.Sequential(one, nn.SiLU(), last)
    twin = nn.Sequential(OfPatches(one), nn.SiLU(), last)
    changed = copy.deepcopy(whole)
    x = torch.randn(6, 3, 6, 7)
    with torch.no_grad():
        changed[0].weight += 0.1 * torch.randn(one.weight.shape)
        plain, wanted = whole(x), changed(x)
        torch.testing.assert_close(twin(x), plain)
    probes = [ProbeBatch(Call((x,), {}), plain, wanted)]
    ours, theirs = fit(whole, "0", probes), fit(twin, "0.linear", probes)
    torch.testing.assert_close(ours.history, theirs.history, atol=1e-3, rtol=0)
    assert ours.history[-1] > 0.5
    torch.testing.assert_close(
        ours.updates["0"].dense(), theirs.updates["0.linear"].dense(), atol=1e-3, rtol=1e-2
    )


class SigmaSide(FlowSide):
    """A model of images and noise sizes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, (1, 6, 6))


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


class Vision(nn.Module):
    """torch's own encoder layers: its attention never calls `out_proj`."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 8, 2, stride=2)
        self.transformer = nn.Sequential(
            *(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))
        )
        self.leave = nn.ConvTranspose2d(8, 1, 2, stride=2)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        h = self.patch(x)
        tokens = self.transformer(h.flatten(2).mT + sigma[:, None, None])
        return self.leave(tokens.mT.unflatten(2, h.shape[2:]))


class Pointwise(nn.Module):
    """Layers in lists, which no name calls blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.leave = nn.Conv2d(1, 8, 2, stride=2), nn.ConvTranspose2d(8, 1, 2, stride=2)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 16, 1),
                nn.GELU(),
                nn.Conv2d(16, 16, 3, padding=1, groups=16),
                nn.Conv2d(16, 8, 1),
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        h = self.patch(x) + sigma[:, None, None, None]
        for layer in self.layers:
            h = h + layer(h)
        return self.leave(h)


@pytest.mark.parametrize("forth", [True, False])
def test_a_fit_crosses_between_torch_s_encoder_and_convolutions_of_one_pixel(forth: bool):
    torch.manual_seed(0)
    linear = {f"transformer.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}
    points = {f"layers.{i}.{j}" for i in (0, 1) for j in (0, 3)}
    sides = (Vision(), linear), (Pointwise(), points)
    (source, adapted), (target, reached) = sides if forth else sides[::-1]
    lora = {}
    for name in sorted(adapted | ({"transformer.0.self_attn.out_proj"} if forth else set())):
        m, n = source.get_submodule(name).weight.flatten(1).shape
        lora[name] = LowRank(torch.randn(m, 2) / 2, torch.randn(2, n) / n**0.5)
    sides = SigmaSide(source), SigmaSide(target)
    moved = fit_models(*sides, lora, images=8, fit_steps=12, rank=2, force=True)
    assert moved.updates.keys() == reached
    assert moved.report.left_out.keys() == lora.keys() - adapted
    assert moved.report.steps[-1] > 0.2
