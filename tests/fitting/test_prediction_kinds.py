"""Models of any kind of prediction are asked at equal log-SNR and answer in each other's terms."""

from __future__ import annotations

import itertools
import math

import diffusers
import pytest
import tiny_pipelines as tiny
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from fitting import ask
from torch import Tensor

from prolora import FitOptions
from prolora import fitting as probe
from prolora.errors import UnsupportedFormat
from prolora.fitting.pipelines import schedules
from prolora.fitting.pipelines.pipeline import Pipeline
from prolora.fitting.pipelines.pipeline_opening import open_pipeline
from prolora.fitting.pipelines.schedules import NoiseSchedule, Times
from prolora.fitting.pipelines.watching import FLOW_STEPS, read_flow, watch_sampling

ALPHAS = torch.linspace(0.999, 0.005, 1000).double()
NARROW = (1 - torch.linspace(0.03, 0.11, 1000).double().square()).cumprod(0)
ZERO_SNR = torch.cat([ALPHAS[:-1], torch.zeros(1).double()])
SCHEDULES = {
    "ε": NoiseSchedule("epsilon", ALPHAS),
    "ε of fewer times": NoiseSchedule("epsilon", NARROW[::2]),
    "v": NoiseSchedule("v_prediction", NARROW),
    "v that ends in noise": NoiseSchedule("v_prediction", ZERO_SNR),
    "ε that ends in noise": NoiseSchedule("epsilon", ZERO_SNR),
    "x₀": NoiseSchedule("sample", ALPHAS),
    "flow": NoiseSchedule("flow", None, times=Times(1.0, 0.0)),
    "negative flow counted backwards": NoiseSchedule(
        "flow", None, sign=-1, times=Times(-1000.0, 1000)
    ),
}
PAIRS = list(itertools.permutations(SCHEDULES, 2))


class Gaussian:
    """The best prediction of any kind where x₀ is normal with a mean and a diagonal covariance."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.mean = torch.randn(5, generator=generator).double()
        self.variance = torch.rand(5, generator=generator).double() + 0.1

    def predict(self, schedule: NoiseSchedule, x: Tensor, time: Tensor) -> Tensor:
        level = schedule.level_at(time)[:, None]
        (a, b), (c, d) = schedule.scales(level), schedule.weights(level)
        shrink = a * self.variance / (a**2 * self.variance + b**2)
        return c * (self.mean + shrink * (x - a * self.mean)) + d * x


def levels_within(low: float, high: float) -> Tensor:
    return low + (high - low) * torch.tensor([0.0, 0.03, 0.2, 0.5, 0.8, 0.99, 1.0]).double()


class GivenSide(probe.FitSide):
    """A side whose predictions are given."""

    def sample(self, number: int, prompt: int) -> probe.Image:
        raise AssertionError("nothing is sampled")

    def build_call(self, *_: object, **__: object) -> probe.Call:
        raise AssertionError("nothing is asked")


def side_of(kind: str) -> probe.FitSide:
    side = GivenSide()
    side.schedule = SCHEDULES[kind]
    return side


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_the_best_models_of_all_kinds_give_the_same_answer(one, other):
    """Predictions and their differences agree to rounding within the levels of both."""
    clean, noise = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0)).double()
    asking = probe.Asking(side_of(one), side_of(other), {})
    ours, theirs = asking.source, asking.target
    wanted = levels_within(*asking.levels)
    level = ours.schedule.level_at(ours.schedule.time_at(wanted))  # times may be whole numbers
    torch.testing.assert_close(level, wanted.double(), rtol=0, atol=1e-6)
    states = [side.mix(clean, noise, level) for side in (ours, theirs)]
    for model in (Gaussian(1), Gaussian(2)):  # the model, and with a LoRA
        mine, best = (
            model.predict(side.schedule, x, side.schedule.time_at(level))
            for side, x in zip((ours, theirs), states, strict=True)
        )
        torch.testing.assert_close(
            ours.convert(theirs, states, level, mine), best, rtol=1e-5, atol=1e-5
        )


def test_both_are_asked_where_both_say_something_of_the_image():
    def ends(one: str, other: str) -> list[float]:
        levels = probe.Asking(side_of(one), side_of(other), {}).levels
        return [schedules.level_log_snr(level) for level in levels]

    table = [math.log(ALPHAS[i] / (1 - ALPHAS[i])) for i in (0, -1)]
    assert ends("flow", "ε") == pytest.approx(table)
    # ε says nothing of x₀ where there is noise alone: asked only where its error stays bounded.
    assert ends("ε that ends in noise", "flow")[1] == pytest.approx(schedules.LEAST_LOG_SNR)
    assert ends("v that ends in noise", "flow")[1] == -math.inf


def test_schedulers_say_what_their_models_predict():
    def read(scheduler: object) -> NoiseSchedule:
        return NoiseSchedule.of(scheduler, "name")

    for made in (
        diffusers.DDIMScheduler(prediction_type="sample"),
        diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True),
        EulerDiscreteScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    ):
        assert read(made).kind == made.config.prediction_type
        assert read(made).alphas.shape == (1000,)
    for made in (
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ):
        assert (read(made).kind, read(made).sign) == ("flow", 1)
    with pytest.raises(UnsupportedFormat, match="SCMScheduler predicts 'trigflow'"):
        read(diffusers.SCMScheduler())
    for made in (
        diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5),
        EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
        FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    ):
        with pytest.raises(UnsupportedFormat, match="a fit handles"):
            read(made)


class Denoiser(torch.nn.Module):
    """Predicts something; counts time as it likes."""

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        return (hidden_states * 0.5 + timestep.double().cos().reshape(-1, 1).to(hidden_states),)


@pytest.mark.parametrize(
    ("time_of", "sign"),
    [
        (lambda t: t / 1000, 1),
        (lambda t: t, 1),
        (lambda t: 1 - t / 1000, -1),
        (lambda t: (1000 - t).bfloat16(), -1),
    ],
)
@pytest.mark.parametrize("guidance", [None, 4.0])
def test_what_a_pipeline_makes_of_times_and_predictions_is_observed(time_of, sign, guidance):
    steps = FlowMatchEulerDiscreteScheduler(shift=2.0)
    denoiser = Denoiser()

    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    steps.set_timesteps(FLOW_STEPS)
    with watch_sampling(denoiser, steps) as seen:
        for t in steps.timesteps:
            (f,) = denoiser(hidden_states=x, timestep=time_of(t).expand(2))
            if guidance:
                f = f + (guidance - 1) * (f - denoiser(x + 1, timestep=time_of(t).expand(2))[0])
            x = steps.step(sign * f, t, x, return_dict=False)[0]
    schedule = read_flow(NoiseSchedule.of(steps, "name"), seen.steps, "name")
    assert schedule.sign == sign
    t = torch.tensor([900.0, 400.0, 30.0])
    torch.testing.assert_close(schedule.level_at(time_of(t)), t.double() / 1000, rtol=0, atol=4e-3)
    assert "step" not in vars(steps) and not denoiser._forward_hooks


@pytest.mark.parametrize(
    ("time_of", "share", "words"),
    [
        (torch.log, 1.0, "not the noise level"),
        (lambda t: 3 * t / 1000 - 1, 1.0, "not the noise level"),
        (torch.clone, 0.0, "not a multiple"),
        (None, 1.0, "never stepped"),
    ],
)
def test_a_pipeline_whose_times_cannot_be_read_is_refused(time_of, share, words):
    steps, denoiser, x = FlowMatchEulerDiscreteScheduler(), Denoiser(), torch.ones(1, 6)
    steps.set_timesteps(FLOW_STEPS)
    with watch_sampling(denoiser, steps) as seen:
        for t in steps.timesteps if time_of else ():
            x = steps.step(share * denoiser(x, time_of(t).expand(1))[0], t, x)[0]
    with pytest.raises(UnsupportedFormat, match=words):
        read_flow(NoiseSchedule.of(steps, "name"), seen.steps, "name")


class FlowOfNoise(UNet2DConditionModel):
    """The flow of a model that predicts ε: the same x₀ at the same log-SNR, by the textbook."""

    alphas = ALPHAS

    def forward(self, sample, timestep, **kwargs):
        u = torch.as_tensor(timestep).reshape(-1).double() / 1000
        u = u.clamp(max=float((1 + (self.alphas[-1] / (1 - self.alphas[-1])).sqrt()) ** -1))
        alpha = (1 - u) ** 2 / ((1 - u) ** 2 + u**2)
        time = (self.alphas[None] - alpha[:, None]).abs().argmin(1).float()
        a, b, u = (s.float()[:, None, None, None] for s in (alpha.sqrt(), (1 - alpha).sqrt(), u))
        x = sample * b / u.clamp_min(1e-6)
        noise = super().forward(x, time, **{**kwargs, "return_dict": False})[0]
        return (noise - (x - b * noise) / a,)


class FlowMatchForNoise(FlowMatchEulerDiscreteScheduler):
    """For a pipeline that was written for noise."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, _: Tensor) -> Tensor:
        return sample


@pytest.mark.slow
def test_a_flow_that_is_an_ε_model_in_other_terms_takes_its_lora_as_it_is(tmp_path):
    torch.manual_seed(0)
    tiny.save(tmp_path / "source")
    source = open_pipeline(tmp_path / "source")
    other = open_pipeline(tmp_path / "source")
    flow = FlowOfNoise(**tiny.UNET, cross_attention_dim=8)
    flow.load_state_dict(source.denoiser.state_dict())
    flow.alphas = source.schedule.alphas
    other.pipe.unet, other.pipe.scheduler = flow.eval(), FlowMatchForNoise(shift=2.0)
    target = Pipeline(other.pipe, "target")
    settings = FitOptions(
        ("cat",), images=1, steps=3, size=16, fit_steps=1, probes=8, held_out=8, rank=4
    )
    lora = tiny.updates(source.denoiser, ("attn1.to_v", "ff.net.2"))
    report = probe.fit_sides(ask(source, target, settings, lora), settings).report
    assert report.log_snr == pytest.approx((-5.364, 7.069), abs=1e-3)
    assert min(report.gate.copy_share.values()) > 0.99  # the flow rounds its times to whole ones
    assert max(report.gate.disagreement.values()) < 0.01
