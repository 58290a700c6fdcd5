"""Models of any kind of prediction are asked at equal log-SNR and answer in each other's terms."""

from __future__ import annotations

import itertools
import math

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from fitting import fit_models
from torch import Tensor

from prolora import FitOptions
from prolora.errors import UnsupportedFormat
from prolora.fitting import pipelines
from prolora.fitting.pipelines import flow_convention, schedules
from prolora.fitting.pipelines.schedules import NoiseSchedule, Times

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


def test_the_best_models_of_all_kinds_give_the_same_answer():
    """Two LoRAs' worth of models: predictions and their differences agree to rounding."""
    clean, noise = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0)).double()
    for one, other in PAIRS:
        ours, theirs = SCHEDULES[one], SCHEDULES[other]
        level = levels_within(*(schedules.common_levels(ours, theirs) or (0.1, 0.9)))
        time = ours.time_at(level)
        level = ours.level_at(time)
        a, b = (s[:, None] for s in ours.scales(level))
        x = a * clean + b * noise
        there = schedules.translate_time(ours, theirs, time)
        theirs_x = schedules.translate_state(ours, theirs, x, time)
        a, b = (s[:, None] for s in theirs.scales(level))
        torch.testing.assert_close(theirs_x, a * clean + b * noise, msg=f"{one} → {other}")
        for model in (Gaussian(1), Gaussian(2)):
            got = schedules.convert_prediction(ours, theirs, x, time, model.predict(ours, x, time))
            best = model.predict(theirs, theirs_x, there)
            torch.testing.assert_close(got, best, rtol=1e-6, atol=1e-6, msg=f"{one} → {other}")


def test_states_beyond_the_common_range_are_moved_to_its_ends():
    flow, table = SCHEDULES["flow"], SCHEDULES["ε"]
    low, high = levels = schedules.common_levels(flow, table)
    assert schedules.level_log_snr(high) == pytest.approx(math.log(ALPHAS[-1] / (1 - ALPHAS[-1])))
    assert schedules.level_log_snr(low) == pytest.approx(math.log(ALPHAS[0] / (1 - ALPHAS[0])))
    noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    latent, time = schedules.clip_state(flow, levels, noise, torch.tensor([1.0, 0.5, 1e-4]))
    assert time.tolist() == pytest.approx([high, 0.5, low])
    torch.testing.assert_close(latent[0], high * noise[0])
    torch.testing.assert_close(latent[1], noise[1])
    torch.testing.assert_close(latent[2], (1 - low) / (1 - 1e-4) * noise[2])
    inside = torch.tensor(0.5)
    assert schedules.clip_state(flow, levels, noise, inside)[0] is noise
    # ε says nothing of x₀ where there is noise alone: asked only where its error stays bounded.
    ends = schedules.common_levels(SCHEDULES["ε that ends in noise"], flow)
    assert schedules.level_log_snr(ends[1]) == pytest.approx(schedules.LEAST_LOG_SNR)
    assert schedules.common_levels(SCHEDULES["v that ends in noise"], flow)[1] == 1.0
    assert schedules.common_levels(table, SCHEDULES["ε of fewer times"]) is None


def test_schedulers_say_what_their_models_predict():
    from diffusers import (
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EDMEulerScheduler,
        EulerDiscreteScheduler,
        SCMScheduler,
        UniPCMultistepScheduler,
    )

    def read(scheduler: object) -> NoiseSchedule:
        return NoiseSchedule.of(scheduler, "name")

    for made in (
        DDIMScheduler(prediction_type="sample"),
        DPMSolverMultistepScheduler(use_karras_sigmas=True),
        EulerDiscreteScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    ):
        assert read(made).kind == made.config.prediction_type
        assert read(made).alphas.shape == (1000,)
    for made in (
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ):
        assert (read(made).kind, read(made).sign) == ("flow", 1)
    with pytest.raises(UnsupportedFormat, match="SCMScheduler predicts 'trigflow'"):
        read(SCMScheduler())
    for made in (
        EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5),
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

    def sample() -> None:
        x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
        steps.set_timesteps(flow_convention.STEPS)
        for t in steps.timesteps:
            (f,) = denoiser(hidden_states=x, timestep=time_of(t).expand(2))
            if guidance:
                f = f + (guidance - 1) * (f - denoiser(x + 1, timestep=time_of(t).expand(2))[0])
            x = steps.step(sign * f, t, x, return_dict=False)[0]

    schedule = flow_convention.observe_flow(
        NoiseSchedule.of(steps, "name"), steps, denoiser, sample, "name"
    )
    assert schedule.sign == sign
    t = torch.tensor([900.0, 400.0, 30.0])
    torch.testing.assert_close(schedule.level_at(time_of(t)), t.double() / 1000, rtol=0, atol=4e-3)
    assert "step" not in vars(steps)


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
    steps = FlowMatchEulerDiscreteScheduler()
    denoiser = Denoiser()

    def sample() -> None:
        x = torch.ones(1, 6)
        steps.set_timesteps(flow_convention.STEPS)
        for t in steps.timesteps if time_of else ():
            x = steps.step(share * denoiser(x, time_of(t).expand(1))[0], t, x)[0]

    with pytest.raises(UnsupportedFormat, match=words):
        flow_convention.observe_flow(
            NoiseSchedule.of(steps, "name"), steps, denoiser, sample, "name"
        )


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


def test_a_flow_that_is_an_ε_model_in_other_terms_takes_its_lora_as_it_is(tmp_path):
    torch.manual_seed(0)
    tiny.save(tmp_path / "source")
    source = pipelines.open_pipeline(tmp_path / "source")
    other = pipelines.open_pipeline(tmp_path / "source")
    flow = FlowOfNoise(**tiny.UNET, cross_attention_dim=8)
    flow.load_state_dict(source.denoiser.state_dict())
    flow.alphas = source.schedule.alphas
    other.pipe.unet, other.pipe.scheduler = flow.eval(), FlowMatchForNoise(shift=2.0)
    target = pipelines.Pipeline(other.pipe, "target")
    pair = pipelines.pair_pipelines(
        source, target, FitOptions(("cat",), images=1, steps=3, size=16)
    )
    assert pair.log_snr == pytest.approx((-5.364, 7.069), abs=1e-3)
    result = fit_models(
        source.denoiser,
        target.denoiser,
        tiny.updates(source.denoiser, ("attn1.to_v", "ff.net.2")),
        source.sampler(pair.settings),
        target.sampler(pair.settings),
        fit_steps=1,
        probes=8,
        held_out=8,
        **vars(pair.translation),
    )
    gate = result.report.gate
    assert min(gate.copy_share.values()) > 0.99  # the flow rounds its times to whole ones
    assert max(gate.disagreement.values()) < 0.01
