"""Fits of toy denoisers whose right answer is known."""

from __future__ import annotations

import copy

import pytest
import torch
from fitting import FlowSide, draw_probes, fit_models, predict
from lora_files import same_bits
from torch import Tensor, nn

from prolora import LowRank, ProLoRAError
from prolora import fitting as probe
from prolora.errors import UnrelatedBases
from prolora.fitting.pipelines.schedules import NoiseSchedule, Times

WIDTH, BLOCKS = 12, 3


class BasicTransformerBlock(nn.Module):
    """The name is what probing looks for; inside, a residual feed-forward layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x)) + t[:, None, None]))


class Denoiser(nn.Module):
    """(n, 5 tokens, 4) and times (n,) -> a velocity of the same shape."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.enter = nn.Linear(4, width)
        self.blocks = nn.ModuleList(BasicTransformerBlock(width) for _ in range(BLOCKS))
        self.leave = nn.Linear(width, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.enter(x)
        for block in self.blocks:
            h = block(h, t)
        return self.leave(h)


def permuted(model: Denoiser) -> Denoiser:
    """The same function with the channels of the residual stream in another order."""
    twin = copy.deepcopy(model)
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(5))
    twin.enter.weight.data = model.enter.weight.data[order]
    twin.enter.bias.data = model.enter.bias.data[order]
    twin.leave.weight.data = model.leave.weight.data[:, order]
    for new, old in zip(twin.blocks, model.blocks, strict=True):
        new.up.weight.data = old.up.weight.data[:, order]
        new.down.weight.data = old.down.weight.data[order]
        new.down.bias.data = old.down.bias.data[order]
    return twin


@pytest.fixture
def source() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser()


@pytest.fixture
def lora() -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(1)

    def update(m: int, n: int) -> LowRank:
        return LowRank(
            0.3 * torch.randn(m, 2, generator=generator), torch.randn(2, n, generator=generator) / 3
        )

    updates = {f"blocks.{i}.up": update(2 * WIDTH, WIDTH) for i in range(BLOCKS)}
    return updates | {f"blocks.{i}.down": update(WIDTH, 2 * WIDTH) for i in range(BLOCKS)}


def test_a_base_in_permuted_coordinates_gets_the_change_that_the_lora_makes(source, lora):
    target = permuted(source)
    result = fit_models(source, target, lora)
    gate = result.report.gate
    assert gate.decision == "go"
    assert gate.share["all"] > 0.9 and gate.copy_share["all"] < 0.5
    assert max(gate.disagreement.values()) < 1e-6
    # New inputs, with the written LoRA in the target's weights; copying is far off.
    x, t = torch.randn(64, 5, 4, generator=torch.Generator().manual_seed(9)), torch.full((64,), 0.6)

    def change(model: nn.Module, updates: dict[str, LowRank]) -> Tensor:
        return predict(model, x, t, updates=updates) - predict(model, x, t)

    wanted = change(source, lora)
    probed, copied = change(target, result.scaled), change(target, lora)
    assert (probed - wanted).square().sum() < 0.15 * wanted.square().sum()
    assert (copied - wanted).square().sum() > 0.5 * wanted.square().sum()


class InMilliseconds(Denoiser):
    """The same denoiser, which takes its times in thousandths and predicts the other way."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return -super().forward(x, t / 1000)


def test_models_with_other_inputs_and_outputs_are_asked_the_same_question(source, lora):
    target = InMilliseconds()
    target.load_state_dict(permuted(source).state_dict())
    side = FlowSide(target)
    side.schedule = NoiseSchedule("flow", None, sign=-1, times=Times(1000.0, 0.0))
    report = fit_models(source, side, lora).report
    assert report.gate.share["all"] > 0.9
    assert max(report.gate.disagreement.values()) < 1e-6


def test_unrelated_bases_are_refused_unless_forced(source, lora):
    torch.manual_seed(99)
    stranger = Denoiser(width=16)
    weak = {n: LowRank(0.1 * u.up, u.down) for n, u in lora.items()}
    with pytest.raises(UnrelatedBases, match="differ by"):
        fit_models(source, stranger, weak)
    forced = fit_models(source, stranger, weak, force=True)
    assert (forced.report.gate.decision, forced.report.gate.copy_share) == ("refuse", None)
    assert {u.shape[0] for u in forced.scaled.values()} == {16, 32}


def test_the_same_seed_gives_the_same_bits_and_leaves_the_models_as_they_were(source, lora):
    target = permuted(source).train()
    target.blocks[1].eval()
    modes = {name: module.training for name, module in target.named_modules()}
    before = copy.deepcopy(source.state_dict()), copy.deepcopy(target.state_dict())
    few = {"images": 2, "fit_steps": 3, "force": True}
    one, two = (fit_models(source, target, lora, **few) for _ in range(2))
    assert same_bits(one.updates, two.updates)
    for model, weights in zip((source, target), before, strict=True):
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
        assert all(p.requires_grad for p in model.parameters())
    assert {name: module.training for name, module in target.named_modules()} == modes


def test_what_is_never_called_gets_nothing(source, lora):
    class Blind(Denoiser):
        """The first block's `up` is read and not called, as in torch's attention."""

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            block, h = self.blocks[0], self.enter(x)
            inner = nn.functional.linear(block.norm(h), block.up.weight, block.up.bias)
            h = h + block.down(torch.tanh(inner + t[:, None, None]))
            for block in self.blocks[1:]:
                h = block(h, t)
            return self.leave(h)

    class Silent(Denoiser):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x * self.leave.bias

    result = fit_models(source, Blind(), lora, force=True, fit_steps=2)
    assert result.scaled.keys() == lora.keys() - {"blocks.0.up"}
    with pytest.raises(ProLoRAError, match=r"Silent calls no linear layer .* it calls none"):
        fit_models(source, Silent(), lora, force=True)


def test_double_precision_and_unknown_modules_are_refused_by_name(source, lora):
    with pytest.raises(ProLoRAError, match="float32"):
        fit_models(source, copy.deepcopy(source).double(), lora)
    with pytest.raises(ProLoRAError, match=r"no module blocks\.7\.up"):
        fit_models(source, source, {"blocks.7.up": next(iter(lora.values()))})


@pytest.mark.parametrize("look", ["target", 0.5, "source"])
def test_the_target_goes_its_share_of_the_way_to_the_look_that_was_asked_for(source, lora, look):
    target = copy.deepcopy(source)
    generator = torch.Generator().manual_seed(3)
    for block in target.blocks:
        block.up.weight.data += 0.1 * torch.randn(2 * WIDTH, WIDTH, generator=generator)
    gate = (result := fit_models(source, target, lora, look=look)).report.gate
    x, t = torch.randn(64, 5, 4, generator=generator), torch.full((64,), 0.6)
    plain, other = predict(target, x, t), predict(source, x, t)
    wanted = predict(source, x, t, updates=lora)
    reached = predict(target, x, t, updates=result.scaled)
    share = {"target": 0.0, "source": 1.0}.get(look, look)
    missed = (reached - wanted - (1 - share) * (plain - other)).square().sum()
    way = (wanted - other + share * (other - plain)).square().sum()
    assert missed < 0.05 * way and gate.share["all"] > 0.95 and gate.decision == "go"
    assert (share > 0) == ("its own look" in " ".join(result.report.sentences()))


def test_batches_mix_origins_and_levels_and_about_a_tenth_has_no_prompt(source, lora):
    asking = probe.Asking(FlowSide(source), FlowSide(permuted(source)), lora)
    probes = draw_probes(asking, images=4, count=360)
    assert {len(one) for one in probes} == {asking.at_once, 360 % asking.at_once}
    assert {one.origin for one in probes} == {"mixed"}
    numbers = [number for one in probes for number in one.numbers]
    prompts = [prompt for one in probes for prompt in one.prompts]
    counts = [numbers.count(number) for number in set(numbers)]
    # Every image is asked about as often.
    assert len(counts) == 12 and max(counts) - min(counts) <= 9
    assert 0.04 < prompts.count(probe.NO_PROMPT) / 360 < 0.18
    levels = torch.cat([one.level for one in probes])
    assert levels.min() < 0.3 < 0.9 < levels.max() and len(levels.unique()) == 360
    held_out = draw_probes(asking, images=4, count=36, held_out=True, seed=9)
    assert {one.origin for one in held_out} == {"source", "adapted", "target"}
    assert not {x for one in held_out for x in one.numbers} & set(numbers)
