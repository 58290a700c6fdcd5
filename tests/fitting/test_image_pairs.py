"""Pairs of images, with and without the LoRA, that teach a target with other latents."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import tiny_pipelines as tiny
import torch
from test_model_classes import SETTINGS, flux, opened, stable_diffusion, updates
from torch import Tensor, nn

from prolora import FitOptions, adapters, fit
from prolora.adapters.adapter import Adapter
from prolora.bases import open_base
from prolora.fitting import pipelines
from prolora.fitting.gate import (
    COPY,
    GO,
    MIN_IMAGE_SHARE,
    REFUSE,
    WEAKEN,
    Gain,
    decide_on_images,
)
from prolora.fitting.pipelines.conditioning import split_call
from prolora.fitting.recording.at_rest import LazySequence
from prolora.fitting.recording.sample_batches import mix_samples
from prolora.fitting.recording.trajectories import Call, decode_calls, encode_calls
from prolora.fitting.recording.translation import PAIR, Question, Translation
from prolora.fitting.recording.wanted import WantedChange, wanted_changes
from prolora.fitting.run import _alternate


class Predicting(nn.Module):
    """Predicts a matrix times its input."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@dataclass(frozen=True)
class OfClean(Translation):
    """The prediction that means an x₀ is its negative."""

    def of_clean(self, call: Call) -> Tensor:
        assert call.clean is not None
        return -call.clean


def pair_of(before: Tensor, after: Tensor, noise: Tensor) -> Question:
    calls = [
        Call((clean + noise,), {}, PAIR, tuple(range(len(clean))), clean)
        for clean in (before, after)
    ]
    return Question(*calls)


def draw(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    before, after, noise = torch.randn(3, n, 6, generator=torch.Generator().manual_seed(seed))
    return before, after, noise


def ask_pair(question: Question) -> WantedChange:
    source, target = Predicting(0), Predicting(1)
    (wanted,) = wanted_changes(source, target, {}, [question], OfClean())
    return wanted


def test_what_is_missed_of_both_images_is_not_wanted():
    before, after, noise = draw(4)
    # No effect of the LoRA: nothing is wanted, though the target misses much of the image.
    wanted = ask_pair(pair_of(before, before, noise))
    assert float(wanted.base_difference.norm()) > 1
    torch.testing.assert_close(wanted.change, torch.zeros_like(before), atol=1e-6, rtol=0)
    wanted = ask_pair(pair_of(before, after, noise))
    target = Predicting(1)
    with torch.no_grad():
        missing, missed = (-z - target(z + noise) for z in (after, before))
    for i in range(4):
        slope = float((missing[i] @ missed[i] / missed[i].square().sum()).clamp(0, 1))
        torch.testing.assert_close(wanted.change[i], missing[i] - slope * missed[i])
        if 0 < slope < 1:
            assert float(wanted.change[i] @ missed[i]) == pytest.approx(0, abs=1e-4)


def test_the_source_is_not_asked_about_pairs(monkeypatch):
    asked = []
    monkeypatch.setattr(
        OfClean, "of_source", lambda self, model, question, **_: asked.append(question)
    )
    ask_pair(pair_of(*draw(2)))
    assert asked == []


def test_pairs_are_cut_joined_and_kept_with_their_images():
    questions = [pair_of(*draw(3, seed)) for seed in range(4)]
    target = Predicting(1)

    def predict(question: Question) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return target(*question.source.args), target(*question.target.args)

    mixed = mix_samples(questions, 8, 3, predict, torch.Generator().manual_seed(0))
    assert [len(question.target.args[0]) for question in mixed] == [3, 3, 2]
    for question in mixed:
        # The same noise on both sides, so the images differ as the states do.
        ours, theirs = question.source, question.target
        torch.testing.assert_close(theirs.args[0] - ours.args[0], theirs.clean - ours.clean)
        assert ours.trajectories == theirs.trajectories
    calls = [mixed[0].source, Call((torch.ones(1),), {}, "source")]
    kept = decode_calls(*encode_calls(calls))
    assert torch.equal(kept[0].clean, calls[0].clean)
    assert kept[1].clean is None


def test_pairs_take_turns_with_answers():
    assert _alternate([1, 2, 3], [7]) == [1, 7, 2, 3]
    assert list(LazySequence(2, lambda i: "abcd"[3 - 2 * i])) == ["d", "b"]


def decide(
    share: float,
    effect: Gain,
    strength: float = 1.0,
    gain: Gain | None = None,
    disagreement: dict[str, float] | None = None,
) -> str:
    shares = {"source": share, "adapted": share, "target": share, "all": share}
    copied = None if gain is None else {"all": share - gain.share}
    return decide_on_images(strength, shares, effect, copied, gain, disagreement)[0]


def test_the_gate_of_crossed_images_asks_for_a_sure_effect():
    sure, unsure = Gain(0.3, 0.05, 48), Gain(0.3, 0.25, 48)
    assert decide(0.3, sure) == GO
    assert decide(0.3, sure, strength=0.5) == WEAKEN
    assert decide(0.3, unsure) == REFUSE
    assert decide(MIN_IMAGE_SHARE - 0.01, sure) == REFUSE
    assert decide(0.0, Gain(0.0, 0.0, 48)) == REFUSE  # a LoRA that does nothing
    assert decide(0.9, Gain(0.9, math.inf, 1)) == REFUSE  # one image is no evidence
    assert decide(0.3, sure, gain=Gain(0.01, 0.05, 48)) == COPY
    assert decide(0.3, sure, gain=Gain(0.2, 0.05, 48)) == GO
    # Where both models saw the same noise, bases that differ are refused as ever.
    unlike = dict.fromkeys(("adapted", "target", "all"), 0.6)
    assert decide(0.3, sure, disagreement=unlike) == REFUSE
    assert decide(0.3, sure, disagreement=dict.fromkeys(unlike, 0.1)) == GO


def test_an_ε_model_and_a_flow_with_one_vae_see_the_same_images_and_noise(tmp_path, monkeypatch):
    """From folder to file, and the two states of every question are of one x₀ and one ε."""
    for make in (stable_diffusion, flux):
        opened(make, tmp_path).pipe.save_pretrained(tmp_path / make.__name__)
    source, target = (tmp_path / make.__name__ for make in (stable_diffusion, flux))
    models = [pipelines.open_pipeline(folder) for folder in (source, target)]
    sides = pipelines.observe_sides(*models, SETTINGS, shared=True)
    for model in models:
        monkeypatch.setattr(type(model.pipe.vae), "encode", lambda *_: pytest.fail("encoded"))
    recorder = pipelines.CrossingRecorder(*sides, Adapter({}, format="diffusers"))
    with torch.no_grad():
        questions = recorder.record_questions(0)
    for question in questions:
        if question.origin == PAIR:
            continue
        states = []
        for side, call in zip(sides, (question.source, question.target), strict=True):
            parts = split_call(side.pipeline.denoiser, call)
            a, b = side.schedule.scales(side.schedule.level_at(parts.time))
            size = torch.hypot(a, b).float()[:, None, None, None]
            states.append(side.space.as_image(parts.latent) / size)
        torch.testing.assert_close(*states, rtol=1e-3, atol=1e-3)
    lora = tiny.write_lora(tmp_path / "l.safetensors", updates(models[0].denoiser))
    probing = FitOptions(("cat",), images=1, steps=2, size=16, fit_steps=1, force=True)
    moved = fit(lora, source, target, probing)
    moved.save(tmp_path / "out.safetensors")
    assert moved.report.probe.crossed == 6 and moved.report.probe.shared
    assert "with the same noise" in " ".join(moved.report.sentences())
    shapes = open_base(target).shapes
    written = adapters.read_adapter(tmp_path / "out.safetensors").updates
    assert written
    assert all(tuple(shapes[name]) == tuple(u.shape) for name, u in written.items())
