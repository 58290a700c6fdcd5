"""Pairs of images, with and without the LoRA, that teach a target beside states of images."""

from __future__ import annotations

import math

import pytest
import tiny_pipelines as tiny
import torch
from fitting import PlainSide, ask, draw_probes
from lora_files import read_lora
from test_model_classes import SETTINGS, flux, opened, stable_diffusion, updates
from torch import nn

from prolora import FitOptions, fit, open_base
from prolora import fitting as probe
from prolora.fitting.gate import (
    COPY,
    GO,
    MIN_IMAGE_SHARE,
    REFUSE,
    WEAKEN,
    Gain,
    decide_gate,
)
from prolora.fitting.pipelines.pipeline_opening import open_pipeline
from prolora.fitting.probes import PAIR, Probe


def answer_pair(changed: bool) -> Probe:
    """Asks a random target about images before and after a LoRA, at half noise."""
    torch.manual_seed(0)
    model = nn.Linear(6, 6, bias=False)
    asking = probe.Asking(PlainSide(model), PlainSide(model), {}, pairs=True)
    before, after, noise = torch.randn(3, 4, 6)
    after = after if changed else before
    level = torch.full((4,), 0.5).double()
    states = (asking.target.mix(clean, noise, level) for clean in (before, after))
    return asking._answer(Probe(PAIR, (0,) * 4, (0,) * 4, level, *states, (before, after)))


def test_what_is_missed_of_both_images_is_not_wanted():
    # No effect of the LoRA: nothing is wanted, though the target misses much of the image.
    same = answer_pair(changed=False)
    assert float(same.difference.norm()) > 1
    torch.testing.assert_close(same.change, torch.zeros(4, 6), atol=1e-5, rtol=0)
    wanted = answer_pair(changed=True)
    assert float(wanted.change.norm()) > 1
    for change, missed in zip(wanted.change, wanted.difference, strict=True):
        missing = change @ missed / missed.square().sum()
        assert float(missing) < 1e-4  # what both miss alike is taken away, and no more


def decide(
    share: float,
    effect: Gain,
    strength: float = 1.0,
    gain: Gain | None = None,
    disagreement: dict[str, float] | None = None,
) -> str:
    shares = {"source": share, "adapted": share, "target": share, "all": share}
    copied = None if gain is None else {"all": share - gain.share}
    apart = disagreement or dict.fromkeys(("adapted", "target", "all"), 0.0)
    return decide_gate(strength, shares, apart, copied, gain, 0.0, effect)[0]


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
    """From folder to file, and the two states of every probe are of one x₀ and one ε."""
    for make in (stable_diffusion, flux):
        opened(make, tmp_path).pipe.save_pretrained(tmp_path / make.__name__)
    source, target = (tmp_path / make.__name__ for make in (stable_diffusion, flux))
    models = [open_pipeline(folder) for folder in (source, target)]
    asking = ask(*models, SETTINGS)
    assert asking.pairs
    for model in models:
        monkeypatch.setattr(type(model.pipe.vae), "encode", lambda *_: pytest.fail("encoded"))
    states = [one for one in draw_probes(asking, 2, 12) if one.origin != PAIR]
    assert sum(map(len, states)) == 6
    for asked in states:
        images = []
        for side, state in ((asking.source, asked.source), (asking.target, asked.target)):
            a, b = side.schedule.scales(asked.level)
            size = torch.hypot(a, b).float()[:, None, None, None]
            images.append(side.space.as_image(state) / size)
        torch.testing.assert_close(*images, rtol=1e-3, atol=1e-3)
    lora = tiny.write_lora(tmp_path / "l.safetensors", updates(models[0].denoiser))
    probing = FitOptions(("cat",), images=1, steps=2, size=16, fit_steps=1, force=True)
    moved = fit(lora, source, target, probing)
    moved.save(tmp_path / "out.safetensors")
    assert moved.report.probe.pairs and moved.report.probe.shared
    assert "6 sampled images, with the same noise" in " ".join(moved.report.sentences())
    shapes = open_base(target).shapes
    written = read_lora(tmp_path / "out.safetensors").updates
    assert written
    assert all(tuple(shapes[name]) == tuple(u.shape) for name, u in written.items())
