"""Fits between pipelines with different latents: images cross by pixels."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import crossing_pipelines as make
import pytest
import tiny_pipelines as tiny
import torch
import torch.nn.functional as F
from fitting import draw_probes
from lora_files import read_header, read_lora
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from prolora import FitOptions, check, fit, open_base
from prolora.bases import vae
from prolora.cli.app import app
from prolora.core import parallel
from prolora.errors import UnsupportedFormat
from prolora.fitting import Asking, gate
from prolora.fitting.models import in_float32
from prolora.fitting.pipelines import latents
from prolora.fitting.pipelines.latents import TOKENS, LatentSpace
from prolora.fitting.pipelines.pipeline_opening import open_pipeline
from prolora.fitting.pipelines.pipeline_side import PipelineSide
from prolora.fitting.pipelines.schedules import NoiseSchedule, Times
from prolora.fitting.sides import Call, FitSide, Image

HEADER = {
    "modelspec.trigger_phrase": "sks cat",
    "ss_tag_frequency": json.dumps({"10_sks": {"neon": 7, "night": 3}}),
}
LEAVES = {
    "sd": ("attn1.to_v", "ff.net.2"),
    "sdxl": ("attn2.to_k", "ff.net.2"),
    "flux": ("attn.to_q", "proj_out"),
}
SIZED = {"sd": None, "sdxl": None, "pixels": None}  # pixels; 16 for all others
FEW = FitOptions(("cat", "dog"), images=1, steps=2, fit_steps=1, force=True)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each pipeline, and a LoRA with trigger words for each source."""
    folder = tmp_path_factory.mktemp("latents")
    for name, save in make.MAKERS.items():
        save(folder / name)
    tiny.save(folder / "sd, another VAE", seed=7, vae_seed=8)
    for name, leaves in LEAVES.items():
        updates = tiny.updates(open_pipeline(folder / name).denoiser, leaves)
        part = "transformer" if name == "flux" else "unet"
        tensors = {f"{part}.{n}.lora_A.weight": u.down for n, u in updates.items()}
        tensors |= {f"{part}.{n}.lora_B.weight": u.up for n, u in updates.items()}
        save_file(tensors, folder / f"{name}.safetensors", HEADER)
    return folder


def observe(room: Path, name: str) -> PipelineSide:
    size = SIZED.get(name, 16)
    settings = FitOptions(("cat", "dog"), images=1, steps=2, size=size)
    return PipelineSide(open_pipeline(room / name), settings, shared=False)


def _scaled(pipe: Any, z: Tensor) -> Tensor:
    config = pipe.vae.config
    return (z - (config.shift_factor or 0.0)) * config.scaling_factor


def _with_statistics(pipe: Any, z: Tensor) -> Tensor:
    """As StableDiffusionXLImg2ImgPipeline.prepare_latents."""
    config = pipe.vae.config
    mean, std = (
        torch.tensor(x).view(1, -1, 1, 1) for x in (config.latents_mean, config.latents_std)
    )
    return (z - mean) * config.scaling_factor / std


ENCODED = {
    "sd": lambda pipe, x: _scaled(pipe, pipe.vae.encode(x).latent_dist.mode()),
    "sdxl": lambda pipe, x: _with_statistics(pipe, pipe.vae.encode(x).latent_dist.mode()),
    "flux": lambda pipe, x: pipe._pack_latents(
        _scaled(pipe, pipe.vae.encode(x).latent_dist.mode()), 1, 8, 8, 8
    ),
    "flux2": lambda pipe, x: pipe._pack_latents(pipe._encode_vae_image(x, None)),
    "qwen": lambda pipe, x: pipe._pack_latents(
        (
            pipe.vae.encode(x[:, :, None]).latent_dist.mode()
            - torch.tensor(pipe.vae.config.latents_mean).view(1, -1, 1, 1, 1)
        )
        / torch.tensor(pipe.vae.config.latents_std).view(1, -1, 1, 1, 1),
        1,
        4,
        8,
        8,
    ),
    "pixels": lambda pipe, x: x,
}


@pytest.mark.parametrize("name", ENCODED)
@torch.no_grad()
def test_latents_show_what_the_pipeline_shows_and_images_become_its_latents(room, name):
    side = observe(room, name)
    pipeline, settings = side.pipeline, side.settings
    seen = pipeline.sample_final("cat", settings, 3)
    latent = seen.latents[-1][:1]
    assert len(seen.steps) == settings.steps
    assert side.sample(3, 0).noise.shape == side.table.like.latent[:1].shape
    arguments = pipeline._build_arguments("cat", settings, 3, "pt")
    shown = torch.as_tensor(pipeline.pipe(**arguments)[0])
    pixels = side.space.decode(latent)
    assert side.pixels == tuple(pixels.shape[-2:]) == (32 if name == "sdxl" else 16,) * 2
    if name != "pixels":  # whose pipeline returns them as they are
        pixels = (pixels / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pixels, shown, rtol=1e-4, atol=1e-5)
    pixels = side.space.decode(latent)
    encoded = side.space.encode(pixels)
    assert encoded.shape == side.table.like.latent[:1].shape
    expected = ENCODED[name](pipeline.pipe, pixels)
    torch.testing.assert_close(encoded, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(side.space.as_latent(side.space.as_image(encoded)), encoded)


def run(room: Path, source: str, target: str, out: Path, *more: str) -> dict[str, Any]:
    line = ["fit", str(room / f"{source}.safetensors"), "--source", str(room / source)]
    line += ["--target", str(room / target), "-o", str(out), "--force"]
    line += ["--prompt", "cat", "--prompt", "dog", "--images", "1", "--steps", "1"]
    result = CliRunner().invoke(app, [*line, "--fit-steps", "1", "--json", *more])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "target", "more"),
    [
        ("sd", "sdxl", ["--resume", "kept"]),
        ("sdxl", "flux", ["--size", "32"]),
        ("flux", "flux2", ["--size", "16"]),
        ("flux", "qwen", ["--size", "16"]),
    ],
)
def test_a_lora_crosses_to_a_file_of_the_target(room, tmp_path, monkeypatch, source, target, more):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out.safetensors"
    report = run(room, source, target, out, *more, "--report", "report.html")
    shapes = open_base(room / target).shapes
    updates = read_lora(out).updates
    assert updates
    for name, update in updates.items():
        assert tuple(shapes[name]) == tuple(update.shape) and update.up.isfinite().all()
    rows = [row for row in report["modules"] if row["rank_out"]]
    assert {row["target"] for row in rows} == set(updates)
    strength = report["probe"]["gate"]["strength"]
    assert strength in (gate.RAISED, *gate.STRENGTHS)
    assert read_header(out)["prolora.strength"] == f"{strength:.4g}"
    assert (report["probe"]["images"], report["probe"]["shared"]) == (6, False)
    sentences = " ".join(report["summary"])
    assert "6 sampled images, which crossed as pixels" in sentences
    assert check(out).trigger_words[:2] == ("sks cat", "neon")
    if "--resume" in more:
        monkeypatch.setattr(PipelineSide, "sample", lambda *_: pytest.fail("sampled"))
        again = run(room, source, target, Path("again.safetensors"), *more)
        assert again["probe"]["resumed"] == 1
        assert Path("again.safetensors").read_bytes() == out.read_bytes()


class LinearVAE(nn.Module):
    """An invertible linear map of pixels: patches of a side, rotated and stretched."""

    def __init__(self, patch: int, stretch: float, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        width = 3 * patch**2
        rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
        self.patch, self.matrix = patch, nn.Parameter(stretch * rotation, requires_grad=False)

    def encode(self, pixels: Tensor) -> tuple[Tensor]:
        patches = F.pixel_unshuffle(pixels, self.patch)
        return (torch.einsum("ij,njhw->nihw", self.matrix, patches),)

    def decode(self, latent: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        patches = torch.einsum("ij,njhw->nihw", self.matrix.inverse(), latent)
        return (F.pixel_shuffle(patches, self.patch),)


class BestDenoiser(nn.Module):
    """The best prediction where images are normal with any mean and covariance."""

    config = SimpleNamespace(in_channels=3)

    def __init__(self, space: LatentSpace, schedule: NoiseSchedule, seed: int) -> None:
        super().__init__()
        self.space, self.schedule = space, schedule
        generator = torch.Generator().manual_seed(seed)
        mean, root = (torch.randn(*s, generator=generator).double() for s in ((48,), (48, 48)))
        origin = self._flatten(torch.zeros(1, 48))
        matrix = (self._flatten(torch.eye(48)) - origin).mT
        self.mean = origin[0] + matrix @ mean
        self.covariance = matrix @ root @ root.mT @ matrix.mT / 48

    def _flatten(self, pixels: Tensor) -> Tensor:
        encoded = self.space.encode(pixels.reshape(-1, 3, 4, 4))
        return self.space.as_image(encoded).double().flatten(1)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        image = self.space.as_image(hidden_states).double()
        level = self.schedule.level_at(timestep)[:, None, None]
        (a, b), (c, d) = self.schedule.scales(level), self.schedule.weights(level)
        noisy = a**2 * self.covariance + b**2 * torch.eye(48).double()
        rest = image.flatten(1)[..., None] - a * self.mean[:, None]
        clean = self.mean[:, None] + a * self.covariance @ torch.linalg.solve(noisy, rest)
        prediction = (c * clean + d * image.flatten(1)[..., None]).reshape(image.shape)
        return (self.space.as_latent(prediction).to(hidden_states),)


class BestSide(FitSide):
    """A side of the best predictions of images of 4 × 4 pixels."""

    def __init__(self, space: LatentSpace, schedule: NoiseSchedule, seed: int) -> None:
        self.space, self.schedule, self.pixels = space, schedule, (4, 4)
        self.denoiser = BestDenoiser(space, schedule, seed)

    def sample(self, number: int, prompt: int) -> Image:
        raise AssertionError("its images are given")

    def build_call(self, state: Tensor, level: Tensor, *_: Any) -> Call:
        return Call((state, self.schedule.time_at(level)), {})


ALPHAS = torch.linspace(0.999, 0.005, 1000).double()
KINDS = {
    "ε": NoiseSchedule("epsilon", ALPHAS),
    "flow": NoiseSchedule("flow", None, times=Times(1000.0, 0.0)),
    "negative flow counted backwards": NoiseSchedule("flow", None, sign=-1, times=Times(-1.0, 1.0)),
}


@pytest.mark.parametrize(("one", "other"), list(itertools.product(KINDS, KINDS)))
def test_between_linear_vaes_the_best_models_answer_as_one(one, other):
    """Of one image with corresponding noise, where the VAEs' spaces differ by a rotation."""
    spaces = (
        LatentSpace(LinearVAE(1, 2.0, 0), scale=torch.full((3,), 2.0), shift=torch.zeros(3)),
        LatentSpace(
            LinearVAE(2, 0.3, 1),
            TOKENS,
            scale=torch.full((12,), 0.3),
            shift=torch.linspace(-1, 1, 12),
        ),
    )
    plain, adapted = (
        [BestSide(s, KINDS[k], seed) for s, k in zip(spaces, (one, other), strict=True)]
        for seed in (1, 2)
    )
    ours, theirs = plain
    generator = torch.Generator().manual_seed(0)
    clean = ours.space.encode(torch.randn(3, 3, 4, 4, generator=generator))
    noise = torch.randn(clean.shape, generator=generator)
    there = ours.cross(clean, theirs)
    noise_there = ours.cross(noise, theirs) - ours.cross(torch.zeros_like(noise), theirs)
    assert float(noise_there.norm()) == pytest.approx(float(noise.norm()), rel=1e-5)
    level = torch.tensor([0.1, 0.5, 0.85]).double()
    states = ours.mix(clean, noise, level), theirs.mix(there, noise_there, level)
    answers = []
    for mine, best in (plain, adapted):
        answer = mine.convert(best, states, level, mine.predict(states[0], level, [0] * 3))
        answers.append((answer, best.predict(states[1], level, [0] * 3)))
    for crossed_answer, best_answer in answers:
        torch.testing.assert_close(crossed_answer, best_answer, rtol=1e-3, atol=1e-4)
    change = [after - before for before, after in zip(*answers, strict=True)]
    torch.testing.assert_close(change[0], change[1], rtol=1e-3, atol=1e-4)


def test_progress_counts_no_sampling_that_observes(room):
    steps: list[str] = []

    def stop(done: int, total: int, name: str) -> None:
        steps.append(name.split(",")[0])
        if "sampling" in name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cross_to(room, room / "sd, another VAE", progress=stop)
    assert steps[1:] == ["opening both pipelines", "sampling sd"]


@pytest.mark.parametrize("fewest", [parallel.PARALLEL_ENTRIES, 1])
def test_a_fit_of_small_models_runs_on_one_thread(room, monkeypatch, fewest):
    """A second thread would spin most of the time; models with larger matrices keep all threads."""
    monkeypatch.setattr(parallel, "PARALLEL_ENTRIES", fewest)
    before, seen = torch.get_num_threads(), dict[str, int]()

    def note(done: int, total: int, name: str) -> None:
        seen[name.split(",")[0]] = torch.get_num_threads()
        if "sampling" in name:
            raise KeyboardInterrupt

    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            cross_to(room, room / "sd, another VAE", progress=note)
        assert seen["sampling sd"] == (2 if fewest == 1 else 1)
        assert torch.get_num_threads() == 2  # also after an error
    finally:
        torch.set_num_threads(before)


def test_a_dry_run_reads_names_alone(room, tmp_path, unopened):
    report = run(room, "sdxl", "flux", tmp_path / "out.safetensors", "--dry-run")
    rows = {row["target"] for row in report["modules"] if row["target"]}
    assert "transformer_blocks.0.attn.to_q" in rows
    assert not any("norm" in name for name in rows)


def test_a_denoiser_in_half_precision_and_one_of_pixels_are_asked_in_float32(room, tmp_path):
    shutil.copytree(room / "sd", tmp_path / "half")
    unet = open_pipeline(room / "sd").denoiser
    unet.half().save_pretrained(tmp_path / "half" / "unet")
    half, other = observe(tmp_path, "half"), observe(room, "pixels")
    assert half.denoiser.dtype == torch.float16
    with in_float32(half.denoiser):
        probes = draw_probes(Asking(half, other, {}), 1, 12, held_out=True)
    assert {asked.origin for asked in probes} == {"source", "adapted", "target"}
    for asked in probes:
        answers = asked.plain, asked.plain - asked.difference  # the target's and the source's
        for part in (asked.source, asked.target, *answers):
            assert part.dtype == torch.float32 and part.isfinite().all()
        assert answers[0].shape[1:] == (3, 16, 16)  # without the learned variance


@pytest.mark.parametrize("broken", ["no VAE", "no encoder"])
def test_what_no_image_can_cross_to_is_refused_before_it_is_loaded(
    room, tmp_path, unopened, broken
):
    target = tmp_path / "target"
    shutil.copytree(room / "sdxl", target)
    if broken == "no VAE":
        shutil.rmtree(target / "vae")
    else:
        file = target / "vae" / "diffusion_pytorch_model.safetensors"
        kept = {k: v for k, v in load_file(file).items() if not k.startswith("encoder.")}
        save_file(kept, file)
    with pytest.raises(UnsupportedFormat, match="not pixels" if broken == "no VAE" else broken):
        cross_to(room, target)
    assert vae.can_fit(room / "sd", room / "sdxl")
    assert "latents_mean" in vae.explain_vae_difference(room / "sd", room / "sdxl")
    assert not vae.can_fit(room / "sd", target)


def cross_to(room: Path, target: Path, **more: Any) -> Any:
    return fit(room / "sd.safetensors", room / "sd", target, FEW, **more)


def test_latents_that_cannot_be_read_are_refused():
    pipe = SimpleNamespace(vae=LinearVAE(1, 1.0, 0))
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for given, words in (
        (None, "never decodes"),
        (x.tanh(), "no multiple of its latents"),
        (x * torch.tensor([1.0, 0.0, 2.0])[:, None, None], "no multiple of its latents"),
        (x[..., :3], "cannot tell how they correspond"),
    ):
        with pytest.raises(UnsupportedFormat, match=words):
            latents.observe_latents(pipe, x, x, given, "name")
    with pytest.raises(UnsupportedFormat, match="given more than a latent"):
        latents.observe_latents(pipe, torch.cat([x, x], 1), x, x, "name")
    with pytest.raises(UnsupportedFormat, match="not a square"):
        latents.observe_latents(pipe, torch.zeros(1, 5, 3), torch.zeros(1, 5, 3), x, "name")
    for encode, words in (
        (lambda _: SimpleNamespace(codes=x), "cannot encode what it decodes"),
        (lambda pixels: (pixels[..., :2],), "encodes them as"),
    ):
        pipe.vae.encode = encode
        with pytest.raises(UnsupportedFormat, match=words):
            latents.observe_latents(pipe, x, x, x, "name")
    pipe.vae.encode = None
    with pytest.raises(UnsupportedFormat, match="no encoder"):
        latents.check_shown(pipe, "name")
