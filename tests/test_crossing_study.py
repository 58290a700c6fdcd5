"""The study of moves between latent spaces in bench/quality: its parts fit together."""

import sys
from pathlib import Path

import pytest
import torch

QUALITY = Path(__file__).parents[1] / "bench/quality"
pytest.importorskip("PIL", reason="Pillow, which reads the sheet of icons, is missing")
pytest.importorskip("diffusers", reason="diffusers, whose models the study trains, is missing")


@pytest.fixture(autouse=True)
def _scripts_can_be_imported(monkeypatch):
    """The study's modules are imported anew, and leave nothing behind."""
    monkeypatch.syspath_prepend(str(QUALITY))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(str(QUALITY)):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("arch", "space", "kind"),
    [("flux", "coarse", "flow"), ("flux", "pixels", "epsilon"), ("unet", "fine", "epsilon")],
)
def test_every_setting_denoises_its_own_shape(arch, space, kind):
    from crossing import Setting, clean_of, mix_noise, sample
    from icons.networks import Painter
    from icons_world import WORLD
    from latents import Codec, decode_latents, encode_images

    setting = Setting(arch, space, kind)
    torch.manual_seed(0)
    model = Painter(arch, "source", setting.shape).eval()
    images = torch.rand(2, 3, 24, 24) * 2 - 1
    codec = None if space == "pixels" else Codec(space).eval()
    clean = encode_images(codec, images)
    assert clean.shape[1:] == setting.shape
    assert decode_latents(codec, clean).shape == images.shape
    y = WORLD.draw_prompts(2, torch.Generator().manual_seed(0), False)
    time = torch.tensor([150.0, 800.0])
    x = mix_noise(setting.schedule, clean, torch.randn(clean.shape), time)
    with torch.no_grad():
        prediction = model(x, time, WORLD.tokens(model, y))[0]
    # f = c·x₀ + d·x for the x₀ that the prediction means.
    means = clean_of(setting.schedule, x, time, prediction)
    c, d = setting.schedule.weights(setting.schedule.level_at(time))
    again = c.float()[:, None, None, None] * means + d.float()[:, None, None, None] * x
    torch.testing.assert_close(again, prediction, rtol=1e-3, atol=1e-4)
    drawn = sample(WORLD, setting, model, y, seed=0, steps=2)
    assert drawn.shape == clean.shape
    assert drawn.isfinite().all()
