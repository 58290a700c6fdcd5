"""The strength of a moved LoRA, measured on running models."""

import pytest
import torch
from torch import nn

from prolora import LowRank
from prolora.errors import InvalidOption
from prolora.probe import Trajectories, measure_strengths
from prolora.probe.recording.trajectories import Call
from prolora.probe.strength import STRENGTHS, choose_moments, fit_vertex

FEW = Trajectories(runs=3, moments=2)


class Net(nn.Module):
    """Two linear layers; `louder` multiplies what it predicts."""

    def __init__(self, louder: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 6)
        for parameter in self.parameters():
            parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
        self.louder = louder

    def forward(self, x, timestep):
        return self.louder * self.outer(self.inner(x) + timestep)


def sampler(model):
    def sample(seed):
        x = torch.randn(2, 6, generator=torch.Generator().manual_seed(seed))
        for t in (1.0, 0.6, 0.2):
            x = x - 0.1 * model(x, timestep=torch.tensor(t))

    return sample


def update():
    generator = torch.Generator().manual_seed(1)
    return {"outer": LowRank(torch.randn(6, 2, generator=generator), torch.ones(2, 6) / 3)}


def measured(target, moved=None, **options):
    source = Net()
    return measure_strengths(
        source,
        target,
        update(),
        moved or {"copy": update()},
        (sampler(source), sampler(target)),
        trajectories=FEW,
        **options,
    )


def test_a_copy_on_the_same_model_is_perfect_at_strength_one():
    copy = measured(Net()).candidates["copy"]
    assert copy.go and copy.strength == pytest.approx(1, abs=1e-3)
    assert copy.share == pytest.approx(1, abs=1e-4)
    assert copy.share_interval[0] > 0.999 and copy.shares[1.0] == pytest.approx(1, abs=1e-4)


def test_a_target_that_answers_twice_as_loud_takes_half_the_strength():
    copy = measured(Net(louder=2.0)).candidates["copy"]
    assert copy.strength == pytest.approx(0.5, abs=1e-3)  # between two points of the grid
    assert copy.share == pytest.approx(1, abs=1e-4)
    assert {origin: round(s, 2) for origin, (s, _) in copy.by_origin.items()} == {
        "adapted": 0.5,
        "target": 0.5,
    }


def test_an_update_that_does_the_opposite_is_no_go_and_the_better_way_is_named():
    opposite = {"outer": LowRank(-update()["outer"].up, update()["outer"].down)}
    result = measured(Net(), {"opposite": opposite, "copy": update()})
    worse = result.candidates["opposite"]
    assert (worse.strength, worse.share, worse.go) == (0.0, 0.0, False)
    assert result.best == "copy" and result.trajectories == 6 and result.calls == 12


def test_the_models_are_as_before_and_progress_ends_at_its_total():
    target, steps = Net(louder=2.0), []
    before = {name: p.clone() for name, p in target.named_parameters()}
    measured(target, progress=lambda *step: steps.append(step))
    assert all(torch.equal(p, before[name]) for name, p in target.named_parameters())
    assert all(p.requires_grad for p in target.parameters()) and target.training
    assert steps[-1][0] == steps[-1][1] == 6 + len(STRENGTHS)


def test_the_vertex_of_a_parabola_is_exact_and_stays_on_the_grid():
    grid = torch.tensor((0.0, *STRENGTHS))
    strength, share = fit_vertex(3 * (grid - 0.7) ** 2 + 0.53, wanted=2.0)
    assert (strength, share) == (pytest.approx(0.7), pytest.approx(1 - 0.53 / 2))
    assert fit_vertex((grid - 9) ** 2, wanted=81.0)[0] == STRENGTHS[-1]
    assert fit_vertex((grid + 1) ** 2, wanted=1.0) == (0.0, 0.0)


def test_moments_are_spread_evenly_over_a_trajectory():
    calls = [Call((i,), {}) for i in range(12)]
    assert [call.args[0] for call in choose_moments(calls, 3)] == [2, 6, 10]
    assert len(choose_moments(calls[:2], 3)) == 2


def test_nothing_to_measure_is_refused():
    with pytest.raises(InvalidOption, match="candidates"):
        source = Net()
        measure_strengths(source, source, update(), {}, (sampler(source), sampler(source)))
    with pytest.raises(InvalidOption, match="runs"):
        Trajectories(runs=0)
