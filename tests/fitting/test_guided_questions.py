"""A source that is asked with its guidance, for targets that are run without."""

from __future__ import annotations

from dataclasses import replace

import crossing_pipelines as crossing
import pytest
import tiny_pipelines as tiny
import torch
from diffusers import LCMScheduler
from fitting import fit_models
from test_model_classes import SETTINGS, flux, opened, sd3, stable_diffusion, updates, z_image
from torch import Tensor

from prolora import FitOptions, fit
from prolora import fitting as probe
from prolora.adapters.adapter import Adapter
from prolora.fitting import pipelines
from prolora.fitting.pipelines.conditioning import split_call
from prolora.fitting.pipelines.flow_convention import watch_steps
from prolora.fitting.pipelines.guidance import observe_guidance, read_guidance_scale
from prolora.fitting.recording.trajectories import record_calls
from prolora.fitting.recording.translation import PAIR


def scale_of(make, folder, guidance: float | None, prompts=SETTINGS.prompts) -> float | None:
    pipeline = opened(make, folder)
    settings = replace(SETTINGS, guidance=guidance, prompts=prompts)
    return observe_guidance(pipeline, settings, pipeline.tabulate_prompts(settings))


@pytest.mark.parametrize(
    ("make", "guidance", "scale"),
    [
        (stable_diffusion, None, 7.5),
        (stable_diffusion, 3.0, 3.0),
        (stable_diffusion, 1.0, 1.0),
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


@pytest.mark.parametrize("make", [stable_diffusion, sd3, z_image])
def test_the_source_is_asked_what_its_pipeline_gives_to_the_scheduler(make, tmp_path):
    source, target = opened(make, tmp_path), opened(make, tmp_path)
    settings = replace(SETTINGS, guidance=4.0, target_guidance=1.0 if make is not z_image else 0.0)
    pair = pipelines.pair_pipelines(source, target, settings)
    used: list[Tensor] = []
    with watch_steps(source.pipe.scheduler, lambda output, _: used.append(output)):
        calls = record_calls(source.denoiser, source.sampler(pair.settings), 0, "source")
    kept = pair.translation.keep_prompted(calls)
    assert len(kept) == len(used) == SETTINGS.images * SETTINGS.steps
    for call, output in zip(kept, used, strict=True):
        assert call.origin == "source"
        parts = split_call(source.denoiser, call)
        assert len(parts.latent) == 1 and pair.translation.guidance
        question = pair.translation.question(call)
        answer = pair.translation.of_source(source.denoiser, question).reshape(output.shape)
        # Z-Image's pipeline negates what its model predicts.
        assert min(float((answer - sign * output).norm()) for sign in (1, -1)) < 1e-4 * float(
            output.norm()
        )
    asked = record_calls(target.denoiser, target.sampler(pair.of_target), 0, "target")
    assert pair.translation.keep_prompted(asked) == asked


def test_pipelines_that_are_both_guided_or_both_not_are_asked_plainly(tmp_path):
    source, target = opened(stable_diffusion, tmp_path), opened(stable_diffusion, tmp_path)
    for settings in (SETTINGS, replace(SETTINGS, guidance=1.0)):
        assert pipelines.pair_pipelines(source, target, settings).translation.guidance is None
    unguided = replace(SETTINGS, guidance=1.0, target_guidance=5.0)
    assert pipelines.pair_pipelines(source, target, unguided).translation.guidance is None


def test_crossed_images_are_asked_with_guidance_and_never_without_a_prompt(tmp_path):
    source, target = opened(stable_diffusion, tmp_path), opened(flux, tmp_path)
    sides = pipelines.observe_sides(source, target, SETTINGS, shared=True)
    recorder = pipelines.CrossingRecorder(*sides, probe_adapter(source))
    guidance = recorder.translation.guidance
    assert guidance and guidance.scale == pytest.approx(7.5, rel=1e-3)
    with torch.no_grad():
        questions = recorder.record_questions(0, held_out=True)
        asked = questions[0]
        plain = replace(recorder.translation, guidance=None)
        call = asked.source
        bare = guidance.without_prompt(call)
        c, u = (
            plain.of_source(source.denoiser, replace(asked, source=part)) for part in (call, bare)
        )
        guided = recorder.translation.of_source(source.denoiser, asked)
    # x₀ is affine in the prediction, so guidance of one is guidance of the other.
    torch.testing.assert_close(guided, u + guidance.scale * (c - u), rtol=1e-3, atol=1e-3)
    for question in questions:
        parts = split_call(source.denoiser, question.source)
        table = sides[0].table
        assert all(table.has_prompt(parts, i) for i in range(len(parts.latent)))


@pytest.mark.parametrize("steps", [1, 2])
def test_a_few_step_target_is_asked_on_the_way_from_a_noise_to_its_image(steps, tmp_path):
    source, target = opened(sd3, tmp_path), opened(sd3, tmp_path)
    settings = replace(SETTINGS, target_steps=steps)
    sides = pipelines.observe_sides(source, target, settings, shared=True)
    recorder = pipelines.CrossingRecorder(*sides, probe_adapter(source))
    with torch.no_grad():
        pairs = [q for q in recorder.record_questions(0) if q.origin == PAIR]
    assert pairs
    for question in pairs:
        number = question.target.trajectories[0]
        generator = torch.Generator().manual_seed(number)
        drawn = torch.randn(1, 4, 8, 8, generator=generator)  # as the pipeline draws it
        for call in (question.source, question.target):
            parts = split_call(target.denoiser, call)
            level = sides[1].schedule.level_at(parts.time)
            a, b = (part.float()[:, None, None, None] for part in sides[1].schedule.scales(level))
            noise = (parts.latent - a * call.clean) / b
            own = float((noise - drawn).abs().max()) < 1e-3
            assert own == (steps == 1)


def test_images_of_the_empty_prompt_alone_are_asked_about(tmp_path):
    source, target = opened(stable_diffusion, tmp_path), opened(stable_diffusion, tmp_path)
    settings = replace(SETTINGS, prompts=("", "cat"), images=1, target_guidance=1.0)
    pair = pipelines.pair_pipelines(source, target, settings)
    runs = [
        record_calls(source.denoiser, source.sampler(pair.settings), seed, origin)
        for seed, origin in enumerate(("source", "adapted"))
    ]
    assert pair.translation.keep_prompted(runs[0]) == runs[0]  # both branches have no prompt
    kept = pair.translation.keep_prompted([*runs[0], *runs[1]])
    assert [call.origin for call in kept] == 2 * ["source"] + 2 * ["adapted"]
    rows = [len(split_call(source.denoiser, call).latent) for call in kept]
    assert rows == [2, 2, 1, 1]
    result = fit_models(
        source.denoiser,
        target.denoiser,
        updates(source.denoiser),
        source.sampler(pair.settings),
        target.sampler(pair.of_target),
        force=True,
        fit_steps=1,
        **vars(pair.translation),
    )
    assert result.report.guidance == pytest.approx(7.5, rel=1e-3)


@pytest.fixture(scope="module")
def crossed(tmp_path_factory) -> list[pipelines.Pipeline]:
    """SDXL, and a target that guides with a negative prompt alone."""
    folder = tmp_path_factory.mktemp("crossed")
    makers = crossing.save_sdxl, crossing.save_qwen_image
    return [pipelines.open_pipeline(save(folder / save.__name__)) for save in makers]


@pytest.mark.parametrize(("guidance", "asked"), [(None, 1), (1.0, 5)])
def test_a_target_that_guides_with_a_negative_prompt_alone_is_no_student(guidance, asked, crossed):
    source, target = crossed
    settings = replace(SETTINGS, size=None, target_guidance=guidance)
    sides = pipelines.observe_sides(source, target, settings, shared=False)
    translation = pipelines.CrossingRecorder(*sides, probe_adapter(source)).translation
    scale = translation.guidance.scale if translation.guidance else 1
    assert scale == pytest.approx(asked, rel=1e-3)


def test_a_guidance_that_cannot_be_read_is_told(tmp_path, monkeypatch, caplog):
    source, target = opened(stable_diffusion, tmp_path), opened(flux, tmp_path)
    monkeypatch.setattr("prolora.fitting.pipelines.guidance.observe_guidance", lambda *_: None)
    sides = pipelines.observe_sides(source, target, SETTINGS, shared=True)
    assert pipelines.CrossingRecorder(*sides, probe_adapter(source)).translation.guidance is None
    assert "stable_diffusion: what its guidance makes" in caplog.text


@pytest.fixture
def probe_twin(tmp_path):
    """Fits to a twin of the source that is sampled in three steps, the source in four."""
    lora, *ends = write_twins(tmp_path)
    probing = FitOptions(
        ("cat", "dog"),
        images=1,
        steps=4,
        size=16,
        target_steps=3,
        fit_steps=1,
        force=True,
        resume=tmp_path / "kept",
    )

    def probed(**changes: float) -> probe.ProbeReport:
        asked = replace(probing, **changes)
        return fit(lora, *ends, asked, again=True).report.probe

    return probed


def test_a_target_with_fewer_steps_is_asked_about_recorded_calls_of_its_own(probe_twin):
    """Three steps beside four are too many for pairs of images."""
    unguided = probe_twin(target_guidance=1.0)
    assert unguided.guidance == pytest.approx(7.5, rel=1e-3)
    assert unguided.probes == unguided.held_out == 4 + 4 + 3 and not unguided.crossed


@pytest.mark.slow
def test_samples_of_another_guidance_of_the_target_are_others(probe_twin):
    """Although the source is asked alike."""
    guided = probe_twin(target_guidance=3.0)
    assert guided.guidance == 1 and guided.resumed == 0
    assert probe_twin(target_guidance=5.0).resumed == 0
    assert probe_twin(target_guidance=5.0).resumed == 1


def test_schedulers_of_few_step_models_take_four_steps(tmp_path):
    pipeline = opened(stable_diffusion, tmp_path)
    settings = replace(SETTINGS, steps=25)
    usual = pipeline.derive_target_settings(settings)
    assert (usual.steps, usual.guidance) == (25, None)
    pipeline.pipe.scheduler = LCMScheduler(**tiny.ALPHAS)
    few = pipeline.derive_target_settings(settings)
    assert (few.steps, few.guidance) == (4, 1.0)  # and without guidance, unless it takes a scale
    assert settings.for_target(True, embeds_guidance=True).guidance is None
    assert pipeline.derive_target_settings(replace(settings, guidance=3.0)).guidance == 3.0
    assert pipeline.derive_target_settings(replace(settings, target_steps=2)).steps == 2
    assert pipeline.derive_target_settings(SETTINGS).steps == SETTINGS.steps == 2


@pytest.mark.slow
def test_a_source_that_guides_by_two_calls_asks_a_student_of_its_guidance(tmp_path):
    folder = crossing.save_flux2(tmp_path / "klein")
    source, target = pipelines.open_pipeline(folder), pipelines.open_pipeline(folder)
    source.pipe.register_to_config(is_distilled=False)
    for pipeline in (source, target):  # a new model hardly listens to its prompt
        for weight in pipeline.denoiser.parameters():
            weight.data *= 3
    pair = pipelines.pair_pipelines(source, target, SETTINGS)
    assert pair.translation.guidance
    assert pair.translation.guidance.scale == pytest.approx(4, rel=1e-3)
    samplers = source.sampler(pair.settings), target.sampler(pair.of_target)
    used: list[Tensor] = []
    with watch_steps(source.pipe.scheduler, lambda output, _: used.append(output)):
        calls = record_calls(source.denoiser, samplers[0], 0, "source")
    kept = pair.translation.keep_prompted(calls)
    assert len(calls) == 2 * len(kept) == 2 * len(used)
    for call, output in zip(kept, used, strict=True):
        answer = pair.translation.of_source(source.denoiser, pair.translation.question(call))
        torch.testing.assert_close(answer, output, rtol=1e-3, atol=1e-3)
    lora = updates(source.denoiser)
    ends = source.denoiser, target.denoiser, lora
    fitted = fit_models(*ends, *samplers, fit_steps=1, force=True, **vars(pair.translation))
    assert fitted.report.probes == 3 * len(used)  # those without the prompt are not asked


def probe_adapter(source: pipelines.Pipeline):
    """A LoRA of the source."""
    return Adapter(updates(source.denoiser), format="diffusers")


def write_twins(folder):
    """A LoRA, its source, and the same model with another schedule."""
    tiny.save(folder / "source")
    unet = pipelines.open_pipeline(folder / "source").denoiser
    tiny.save(folder / "twin", unet=unet, scheduler="euler")
    lora = tiny.write_lora(folder / "l.safetensors", tiny.updates(unet, ("attn1.to_v",)))
    return lora, folder / "source", folder / "twin"


def test_a_target_without_guidance_is_sampled_so_and_the_report_says_what_was_asked(tmp_path):
    lora, *ends = write_twins(tmp_path)
    probing = FitOptions(("cat", "dog"), images=1, steps=2, size=16, fit_steps=1, force=True)
    few = replace(probing, target_steps=1, target_guidance=1.0)
    moved = fit(lora, *ends, few, again=True)
    report = moved.report.probe
    assert report.guidance == pytest.approx(7.5, rel=1e-3)
    # Three origins of one image, and the pair of the first two, at as many levels as the source's.
    assert report.probes == 4 * 2 and report.crossed == 6 and report.shared
    text = " ".join(report.sentences())
    assert "The target is run without guidance, so the source was asked with its own, 7.5." in text
    plain = fit(lora, *ends, probing, again=True).report.probe
    assert plain.guidance == 1 and plain.probes == 3 * 2
    assert "guidance" not in " ".join(plain.sentences())
