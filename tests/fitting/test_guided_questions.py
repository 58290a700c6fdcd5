"""A source that is asked with its guidance, for targets that are run without."""

from __future__ import annotations

from dataclasses import replace

import crossing_pipelines as crossing
import pytest
import tiny_pipelines as tiny
import torch
from diffusers import LCMScheduler
from fitting import ask, draw_probes, watch_calls
from test_model_classes import SETTINGS, flux, opened, sd3, stable_diffusion, updates, z_image
from torch import Tensor

from prolora import FitOptions, fit
from prolora import fitting as probe
from prolora.fitting.pipelines.pipeline import Pipeline
from prolora.fitting.pipelines.pipeline_opening import open_pipeline
from prolora.fitting.pipelines.pipeline_side import PipelineSide, observe_guidance
from prolora.fitting.pipelines.watching import read_guidance_scale
from prolora.fitting.probes import PAIR, Probe
from prolora.fitting.sides import NO_PROMPT


def scale_of(make, folder, guidance: float | None, prompts=SETTINGS.prompts) -> float | None:
    settings = replace(SETTINGS, guidance=guidance, prompts=prompts)
    return observe_guidance(PipelineSide(opened(make, folder), settings, shared=True))


@pytest.mark.parametrize(
    ("make", "guidance", "scale"),
    [
        (stable_diffusion, None, 7.5),
        (sd3, 4.0, 4.0),
        (z_image, 4.0, 5.0),  # c + g·(c − u)
        (z_image, 0.0, 1.0),
        (flux, 4.0, 1.0),  # an input of the model, and no second branch
    ],
)
def test_the_scale_is_that_of_what_the_scheduler_is_given(make, guidance, scale, tmp_path):
    assert scale_of(make, tmp_path, guidance) == pytest.approx(scale, rel=1e-3)


def test_guidance_away_from_the_empty_prompt_alone_is_none(tmp_path):
    assert scale_of(stable_diffusion, tmp_path, 3.0, ()) == 1
    # An empty prompt among others is the other branch's, and hides nothing.
    assert scale_of(stable_diffusion, tmp_path, 3.0, ("", "cat")) == pytest.approx(3)


def test_what_is_no_sum_of_both_branches_has_no_scale():
    prompted, free = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).double()
    guided = free + 3 * (prompted - free)
    assert read_guidance_scale(-guided, [prompted], [free]) == pytest.approx(3)
    assert read_guidance_scale(guided.sin(), [prompted], [free]) is None
    assert read_guidance_scale(prompted - free, [prompted], [free]) is None
    assert read_guidance_scale(guided, [prompted], [prompted]) == 1


def guided_answer(asking: probe.Asking, state: Tensor, level: Tensor) -> Tensor:
    """The source's answer at a state, as the target is taught it."""
    asked = Probe("source", (0,), (0,), level, state, state)
    return asking._ask_source(asked, adapted=False)


@pytest.mark.parametrize("make", [sd3, z_image])
def test_the_source_is_asked_what_its_pipeline_gives_to_the_scheduler(make, tmp_path):
    source, target = opened(make, tmp_path), opened(make, tmp_path)
    none = 0.0 if make is z_image else 1.0
    asking = ask(source, target, replace(SETTINGS, guidance=4.0, target_guidance=none))
    assert asking.guidance > 1
    calls = watch_calls(asking.source)
    assert len(calls) == SETTINGS.steps
    for parts, _, used in calls:
        level = asking.source.schedule.level_at(parts.time[:1])
        with torch.no_grad():
            answer = guided_answer(asking, parts.latent[:1], level).reshape(used.shape)
        # Z-Image's pipeline negates what its model predicts.
        least = min(float((answer - sign * used).norm()) for sign in (1, -1))
        assert least < 1e-4 * float(used.norm())


def test_pipelines_that_are_both_guided_or_both_not_are_asked_plainly(tmp_path):
    source, target = opened(stable_diffusion, tmp_path), opened(stable_diffusion, tmp_path)
    unguided = replace(SETTINGS, guidance=1.0)
    for settings in (SETTINGS, unguided, replace(unguided, target_guidance=5.0)):
        assert ask(source, target, settings).guidance == 1


def test_a_guided_source_is_never_asked_without_a_prompt_by_itself(tmp_path):
    source, target = opened(stable_diffusion, tmp_path), opened(flux, tmp_path)
    asking = ask(source, target, SETTINGS)
    assert asking.guidance == pytest.approx(7.5, rel=1e-3)
    drawn = draw_probes(asking, 2, 40)
    assert NO_PROMPT not in {number for asked in drawn for number in asked.prompts}
    plain = ask(source, opened(stable_diffusion, tmp_path), SETTINGS)
    free = [number == NO_PROMPT for asked in draw_probes(plain, 2, 40) for number in asked.prompts]
    assert 0 < sum(free) < len(free) / 2


def test_a_few_step_target_is_asked_on_the_way_from_a_noise_to_its_image(tmp_path, monkeypatch):
    source, target = opened(sd3, tmp_path), opened(sd3, tmp_path)
    asking = ask(source, target, replace(SETTINGS, target_steps=1))
    assert asking.pairs and not ask(source, target, SETTINGS).pairs
    monkeypatch.setattr(probe.Asking, "_answer", lambda _, asked: asked)
    pairs = [asked for asked in draw_probes(asking, 2, 24) if asked.origin == PAIR]
    assert sum(map(len, pairs)) == 12
    for asked in pairs:
        a, b = (x.float()[:, None, None, None] for x in asking.target.schedule.scales(asked.level))
        for clean, state in zip(asked.clean, (asked.source, asked.target), strict=True):
            for number, noise in zip(asked.numbers, (state - a * clean) / b, strict=True):
                generator = torch.Generator().manual_seed(number)
                drawn = torch.randn(1, 4, 8, 8, generator=generator)  # as the pipeline draws it
                torch.testing.assert_close(noise, drawn[0], rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def crossed(tmp_path_factory) -> list[Pipeline]:
    """SDXL, and a target that guides with a negative prompt alone."""
    folder = tmp_path_factory.mktemp("crossed")
    makers = crossing.save_sdxl, crossing.save_qwen_image
    return [open_pipeline(save(folder / save.__name__)) for save in makers]


@pytest.mark.slow
@pytest.mark.parametrize(("guidance", "asked"), [(None, 1), (1.0, 5)])
def test_a_target_that_guides_with_a_negative_prompt_alone_is_no_student(guidance, asked, crossed):
    settings = replace(SETTINGS, size=None, target_guidance=guidance)
    assert ask(*crossed, settings, shared=False).guidance == pytest.approx(asked, rel=1e-3)


def test_a_guidance_that_cannot_be_read_is_told(tmp_path, monkeypatch, caplog):
    source, target = opened(stable_diffusion, tmp_path), opened(flux, tmp_path)
    monkeypatch.setattr("prolora.fitting.pipelines.pipeline_side.observe_guidance", lambda *_: None)
    assert ask(source, target, SETTINGS).guidance == 1
    assert "stable_diffusion: what its guidance makes" in caplog.text


def test_schedulers_of_few_step_models_take_four_steps(tmp_path):
    pipe, settings = stable_diffusion(tmp_path / "vocabulary"), replace(SETTINGS, steps=25)
    pipe.save_pretrained(tmp_path / "usual")
    usual = open_pipeline(tmp_path / "usual").derive_target_settings(settings)
    assert (usual.steps, usual.guidance) == (25, None)
    pipe.register_modules(scheduler=LCMScheduler(**tiny.ALPHAS))
    pipe.save_pretrained(tmp_path / "student")
    pipeline = open_pipeline(tmp_path / "student")
    few = pipeline.derive_target_settings(settings)
    assert (few.steps, few.guidance) == (4, 1.0)  # and without guidance, unless it takes a scale
    assert settings.for_target(True, embeds_guidance=True).guidance is None
    assert pipeline.derive_target_settings(replace(settings, guidance=3.0)).guidance == 3.0
    assert pipeline.derive_target_settings(replace(settings, target_steps=2)).steps == 2
    assert pipeline.derive_target_settings(SETTINGS).steps == SETTINGS.steps == 2


@pytest.mark.slow
def test_a_source_that_guides_by_two_calls_asks_a_student_of_its_guidance(tmp_path):
    folder = crossing.save_flux2(tmp_path / "klein")
    source, target = open_pipeline(folder), open_pipeline(folder)
    source.pipe.register_to_config(is_distilled=False)
    for pipeline in (source, target):  # a new model hardly listens to its prompt
        for weight in pipeline.denoiser.parameters():
            weight.data *= 3
    asking = ask(source, target, SETTINGS, updates(source.denoiser))
    assert asking.guidance == pytest.approx(4, rel=1e-3)
    for parts, _, used in watch_calls(asking.source):
        level = asking.source.schedule.level_at(parts.time[:1])
        with torch.no_grad():
            answer = guided_answer(asking, parts.latent[:1], level)
        torch.testing.assert_close(answer, used, rtol=1e-3, atol=1e-3)
    few = replace(SETTINGS, fit_steps=1, force=True, probes=4, held_out=6)
    assert probe.fit_sides(asking, few).report.guidance == pytest.approx(4, rel=1e-3)


@pytest.mark.slow
def test_a_target_without_guidance_is_sampled_so_and_the_report_says_what_was_asked(tmp_path):
    lora, *ends = write_twins(tmp_path)
    few = FitOptions(("cat", "dog"), images=1, steps=4, size=16, fit_steps=1, force=True)

    def fitted(**changes: float) -> probe.ProbeReport:
        options = replace(few, resume=tmp_path / "parts", **changes)
        return fit(lora, *ends, options, again=True).report.probe

    sentence = "The target is run without guidance, so the source was asked with its own, 7.5."
    student = fitted(target_steps=1, target_guidance=1.0)
    assert student.guidance == pytest.approx(7.5, rel=1e-3) and student.shared
    assert student.pairs and sentence in student.sentences()
    slower = fitted(target_steps=3, target_guidance=1.0)  # more than half as many steps
    assert slower.guidance == pytest.approx(7.5, rel=1e-3) and not slower.pairs
    plain = fitted()
    assert plain.guidance == 1 and "guidance" not in " ".join(plain.sentences())
    # Samples of another guidance are others, although the source is asked alike.
    scales = (3.0, 5.0, 5.0)
    fits = [fitted(target_steps=3, target_guidance=scale) for scale in scales]
    assert [one.resumed for one in fits] == [0, 0, 1]


def write_twins(folder):
    """A LoRA, its source, and the same model with another schedule."""
    tiny.save(folder / "source")
    unet = open_pipeline(folder / "source").denoiser
    tiny.save(folder / "twin", unet=unet, scheduler="euler")
    lora = tiny.write_lora(folder / "l.safetensors", tiny.updates(unet, ("attn1.to_v",)))
    return lora, folder / "source", folder / "twin"
