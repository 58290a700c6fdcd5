"""All updates at once: Gauss–Newton steps, and batches put together from recorded calls."""

from __future__ import annotations

import pytest
import torch
from test_probe import Denoiser, lora, permuted, run, sampler, source
from torch import Tensor, nn

from prolora import LowRank, probe
from prolora.probe import gate
from prolora.probe.fitting import curvature
from prolora.probe.fitting.joint_fit import JointFit, JointProblem, cut_updates, fit_jointly
from prolora.probe.fitting.linearisation import ProbeBatch
from prolora.probe.fitting.low_rank import count_directions
from prolora.probe.recording.batches import count_samples, mix_samples
from prolora.probe.recording.trajectories import Call, predict_call, record_calls
from prolora.probe.recording.translation import Question

__all__ = ["lora", "source"]  # fixtures


def fit(
    model: nn.Module, names: list[str], probes: list[ProbeBatch], steps: int, damping: float
) -> JointFit:
    return fit_jointly(JointProblem(model, names, lambda y: y, lambda: probes, steps, damping))


def test_a_linear_model_is_solved_exactly_in_a_few_steps():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False))
    x, update = torch.randn(400, 6), torch.randn(5, 6)
    with torch.no_grad():
        plain = model(x)
    probes = [ProbeBatch(Call((x,), {}), plain, plain + x @ update.mT)]
    result = fit(model, ["0"], probes, 6, 1e-6)
    torch.testing.assert_close(result.updates["0"], update, atol=2e-2, rtol=2e-2)
    assert result.history[0] == pytest.approx(0, abs=1e-6)
    assert result.history[-1] > 0.999


def test_a_layer_that_is_too_wide_for_a_full_factor_is_fitted_with_a_diagonal(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    x = torch.randn(300, 6)
    with torch.no_grad():
        plain = model(x)
        wanted = model(x @ (torch.eye(6) + 0.1 * torch.randn(6, 6)))
    probes = [ProbeBatch(Call((x,), {}), plain, wanted)]
    for limit in (100, 5):
        monkeypatch.setattr(curvature, "MAX_FACTOR", limit)
        result = fit(model, ["0", "2"], probes, 8, 1.0)
        assert result.history[-1] > 0.9, limit
        assert cut_updates(result, 2)["0"].shape == (5, 6)


class WithBlindEnd(nn.Module):
    """A second layer whose output is thrown away, as in the text stream of a last block."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.asleep = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        self.idle(x)
        return self.used(x)


def test_a_module_that_does_not_reach_the_prediction_gets_no_update():
    torch.manual_seed(0)
    x = torch.randn(50, 6)
    probes = [ProbeBatch(Call((x,), {}), torch.zeros(50, 6), torch.randn(50, 6))]
    result = fit(WithBlindEnd(), ["used", "idle", "asleep"], probes, 3, 1.0)
    assert set(cut_updates(result, 4)) == {"used"}


def test_the_cut_at_full_rank_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    x = torch.randn(50, 6)
    probes = [ProbeBatch(Call((x,), {}), torch.zeros(50, 5), torch.randn(50, 5))]
    result = fit(model, ["0"], probes, 1, 1.0)
    torch.testing.assert_close(cut_updates(result, 5)["0"].dense(), result.updates["0"])


def test_a_share_as_rank_keeps_as_many_directions_as_hold_it(source, lora):
    assert count_directions(torch.tensor([3.0, 1.0, 1.0]), 0.8) == 1
    assert count_directions(torch.tensor([3.0, 1.0, 1.0]), 0.85) == 2
    assert count_directions(torch.tensor([3.0, 1.0, 1.0]), 7) == 3
    result = run(source, permuted(source), lora, rank=0.9, steps=6)
    ranks = {update.rank for update in result.adapter.updates.values()}
    assert 1 <= min(ranks) < max(ranks) <= 12
    assert result.report.gate.share["all"] > 0.7
    with pytest.raises(ValueError, match="rank"):
        probe.FitSettings(rank=2.5)


def questions(model: nn.Module, seed: int = 0) -> list[Question]:
    return [Question(call, call) for call in record_calls(model, sampler(model), seed, "source")]


def test_mixed_batches_hold_samples_of_many_calls_and_predict_the_same(source):
    asked = questions(source)

    def both(question: Question) -> tuple[Tensor, Tensor]:
        return predict_call(source, question.source), predict_call(source, question.target)

    batches = mix_samples(asked, 30, 48, both, torch.Generator().manual_seed(0))
    assert [count_samples(question.source) for question in batches] == [12, 12, 6]
    first = batches[0].source
    assert len(first.args[1].unique()) == 3  # times of all three calls
    predictions = torch.cat([predict_call(source, question.source) for question in asked])
    for row in predict_call(source, first):
        assert (predictions - row).abs().amax((1, 2)).min() < 1e-5


class OneTime(Denoiser):
    """Takes one time for all samples of a call, as diffusers' pipelines give it."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t.reshape(-1)[:1].expand(len(x)))


def test_calls_whose_samples_cannot_be_mixed_stay_whole(source, lora):
    model = OneTime()
    model.load_state_dict(source.state_dict())
    calls = [Call((torch.randn(12, 5, 4), torch.tensor(t)), {}, "source") for t in (0.9, 0.5, 0.1)]

    def both(question: Question) -> tuple[Tensor, Tensor]:
        return predict_call(model, question.source), predict_call(model, question.target)

    asked = [Question(call, call) for call in calls]
    batches = mix_samples(asked, 20, 48, both, torch.Generator().manual_seed(0))
    assert len(batches) == 2
    assert all(any(one is other for other in asked) for one in batches)


class WithPlaces(Denoiser):
    """Takes the places of its 5 tokens, as FLUX does."""

    def forward(self, x: Tensor, t: Tensor, places: Tensor | None = None) -> Tensor:
        return super().forward(x + places[None, :, None], t)


@pytest.mark.parametrize("images", [4, 5])
def test_what_all_samples_share_is_not_cut_even_where_its_length_is_theirs(source, images):
    model = WithPlaces()
    model.load_state_dict(source.state_dict())
    calls = [
        Call(
            (torch.randn(images, 5, 4), torch.rand(images)), {"places": torch.arange(5.0)}, "source"
        )
        for _ in range(3)
    ]

    def both(question: Question) -> tuple[Tensor, Tensor]:
        return predict_call(model, question.source), predict_call(model, question.target)

    asked = [Question(call, call) for call in calls]
    batches = mix_samples(asked, 2 * images, 48, both, torch.Generator().manual_seed(0))
    assert len(batches) == 2
    assert all(torch.equal(one.source.kwargs["places"], torch.arange(5.0)) for one in batches)


def test_another_architecture_gets_updates_of_all_its_own_modules(source, lora):
    class FluxSingleTransformerBlock(nn.Module):
        """Another name and other insides than the source's blocks have."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.Linear(1, 16)
            self.mix = nn.Linear(16, 16)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x + torch.tanh(self.mix(x) + self.norm(t[:, None, None]))

    torch.manual_seed(7)
    other = Denoiser(width=16)
    other.blocks = nn.ModuleList(FluxSingleTransformerBlock() for _ in range(2))
    result = run(source, other, lora, force=True, steps=4)
    assert set(result.adapter.updates) == {"blocks.0.mix", "blocks.1.mix"}
    assert result.report.modules == 2
    assert result.report.gate.copy_share is None


def test_progress_names_every_step(source, lora):
    seen = []
    run(
        source,
        permuted(source),
        lora,
        force=True,
        steps=3,
        progress=lambda done, total, name: seen.append((done, total, name)),
    )
    assert [row for row in seen if row[2] != "asking"] == [
        (0, 3, "step 1"),
        (1, 3, "step 2"),
        (2, 3, "step 3"),
        (3, 3, "judged"),
    ]


def test_the_fit_is_sized_by_what_was_sampled():
    large = probe.FitSettings().sized(7200)
    assert (large.probes, large.held_out, large.batch) == (1152, 192, 48)
    small = probe.FitSettings(batch=6).sized(960)
    assert (small.probes, small.held_out, small.batch) == (220, 48, 6)
    assert 3 * small.probes + 7 * small.held_out + 5 * 11 * small.steps < 3 * 960
    assert probe.FitSettings().sized(10).batch == 4


def test_an_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match="joint, blocks"):
        probe.FitSettings(strategy="both")


def test_between_related_bases_that_agree_the_fit_starts_from_the_copy(source, lora):
    torch.manual_seed(3)
    tuned = Denoiser()
    tuned.load_state_dict(source.state_dict())
    with torch.no_grad():
        for block in tuned.blocks:
            block.down.weight += 0.02 * torch.randn_like(block.down.weight)
    result = run(source, tuned, lora, steps=12)
    assert result.report.start == "copy"
    assert result.report.steps[0] == pytest.approx(result.report.gate.copy_share["all"], abs=0.05)
    assert result.report.gate.share["all"] > result.report.gate.copy_share["all"]
    assert "starting from the copied updates" in result.report.sentences()[0]
    outside = LowRank(0.1 * torch.ones(4, 1), torch.ones(1, 12) / 12)
    more = run(source, tuned, lora | {"leave": outside}, steps=12)
    assert more.report.left_out == {}
    strength = more.report.gate.strength
    torch.testing.assert_close(more.adapter.updates["leave"].dense(), strength * outside.dense())
    assert run(source, permuted(source), lora, steps=2, force=True).report.start == "zero"


def test_a_copy_that_serves_is_kept_unless_the_bases_agree():
    share = dict.fromkeys(("adapted", "target", "all"), 0.93)
    agree, disagree = ({"adapted": 0.1, "target": x} for x in (0.2, 0.9))
    assert gate.decide_gate(1.0, share, agree, {"all": 0.9})[0] == "go"
    assert gate.decide_gate(1.0, share, agree, {"all": 0.94})[0] == "copy"
    assert gate.decide_gate(1.0, share, disagree, {"all": 0.9})[0] == "copy"
    assert gate.decide_gate(1.0, share, disagree, {"all": 0.3})[0] == "go"
    far = {"adapted": 0.1, "target": 7.0}
    assert gate.decide_gate(1.0, share, far, {"all": 0.6})[0] == "copy"
    assert gate.decide_gate(1.0, share, far, {"all": 0.3})[0] == "refuse"
    assert gate.decide_gate(1.0, share, far, None)[0] == "refuse"
