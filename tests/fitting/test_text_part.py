"""The source is asked with the part of its LoRA that lies in the text encoders."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny_pipelines as tiny
import torch
from fitting import ask, draw_probes, watch_calls
from lora_files import same_bits
from safetensors.torch import load_file, save_file
from torch import Tensor

import prolora
from prolora import LowRank, ProLoRAError, adapters
from prolora.architectures.modules import is_in_text_encoder
from prolora.fitting.pipelines.pipeline import Pipeline, run_text_encoders_beside
from prolora.fitting.pipelines.pipeline_opening import open_pipeline
from prolora.fitting.pipelines.pipeline_side import PipelineSide
from prolora.fitting.probes import Probe
from prolora.fitting.settings import FitSettings
from prolora.fitting.updates import with_lora

SETTINGS = FitSettings(
    ("cat", "dog cat"), images=2, steps=2, size=16, guidance=4.0, target_guidance=1.0
)


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """Two pipelines of unlike text encoders, and a kohya LoRA with a part in that of the first."""
    folder = tmp_path_factory.mktemp("text")
    tiny.save(folder / "source", seed=1)
    tiny.save(folder / "target", seed=1, text=12)
    source = open_pipeline(folder / "source")
    tiny.write_lora_with_text(folder / "lora.safetensors", source.pipe)
    return folder


def parts_of(room: Path) -> tuple[dict[str, LowRank], dict[str, LowRank]]:
    """The updates of the denoiser, and those of the text encoder."""
    updates = adapters.read_adapter(room / "lora.safetensors").updates
    text = {name: u for name, u in updates.items() if is_in_text_encoder(name)}
    assert text and len(text) < len(updates)
    return {n: u for n, u in updates.items() if n not in text}, text


@pytest.fixture(scope="module")
def opened(room: Path) -> tuple[Pipeline, Pipeline]:
    return tuple(open_pipeline(room / name) for name in ("source", "target"))


def test_the_source_with_its_lora_is_what_diffusers_makes_of_the_same_file(room, opened):
    """Its answers in a sampling, both branches of the guidance, with the text encoder's part."""
    updates, text = parts_of(room)
    ours = ask(*opened, SETTINGS, updates, text)
    theirs = open_pipeline(room / "source")
    theirs.pipe.load_lora_weights(room / "lora.safetensors")
    calls = watch_calls(PipelineSide(theirs, SETTINGS, shared=True))
    assert len(calls) == SETTINGS.steps
    with torch.no_grad(), with_lora(ours.source.denoiser, updates):
        for parts, _, used in calls:
            level = ours.source.schedule.level_at(parts.time[:1])
            state = parts.latent[:1]
            answer = ours._ask_source(Probe("adapted", (0,), (0,), level, state, state), True)
            torch.testing.assert_close(answer, used, rtol=1e-3, atol=1e-4)


def test_what_the_text_encoders_part_changes_is_wanted_of_the_target(room, opened):
    """Of a LoRA that has no other part; its images are drawn with it, too."""
    alone, nothing = (
        draw_probes(ask(*opened, SETTINGS, {}, text), 1, 6, held_out=True)
        for text in (parts_of(room)[1], {})
    )
    for asked, bare in zip(alone, nothing, strict=True):
        assert float(asked.change.norm()) > 1e-3 and float(bare.change.norm()) == 0
        assert torch.equal(asked.target, bare.target) == (asked.origin != "adapted")


def test_text_encoders_are_as_before_once_their_part_was_in_place(room, opened):
    (_, text), (source, _) = parts_of(room), opened
    encoder = source.pipe.text_encoder
    ids = torch.tensor([[52, 1, 2, 53, 53, 53, 53, 53]])
    with torch.no_grad():
        before = encoder(ids).last_hidden_state
        with run_text_encoders_beside(source, text):
            beside = encoder(ids).last_hidden_state
        after = encoder(ids).last_hidden_state
    assert torch.equal(before, after) and not torch.allclose(before, beside, atol=1e-2)
    with pytest.raises(ProLoRAError, match="has no text_encoder_2, which the LoRA has"):
        with run_text_encoders_beside(
            source, {"text_encoder_2.x": LowRank(torch.zeros(1, 1), torch.zeros(1, 1))}
        ):
            pass


FEW = {"prompts": ("cat", "dog"), "images": 1, "steps": 2, "fit_steps": 3, "force": True}


def fitted(room: Path, target: str, **options) -> prolora.Transfer:
    return prolora.fit(room / "lora.safetensors", room / "source", room / target, **FEW | options)


@pytest.mark.slow
def test_what_has_no_text_encoder_to_go_to_is_fitted_into_the_blocks(room):
    moved, alone = (fitted(room, "target", text_encoder=way) for way in ("copy", "skip"))
    for done, reason in ((moved, "fitted into the target's modules"), (alone, "left out as asked")):
        rows = [row for row in done.report.modules if is_in_text_encoder(row.source)]
        assert rows and all(row.status == "skipped" and reason in row.reason for row in rows)
        assert not any(is_in_text_encoder(name) for name in done.adapter.updates)
    name = next(iter(moved.adapter.updates))
    one, other = (done.adapter.updates[name].dense() for done in (moved, alone))
    assert not torch.allclose(one, other, rtol=0.05, atol=1e-4)


@pytest.fixture
def seen(monkeypatch) -> list[tuple[str, Tensor]]:
    """(Pipeline, its conditioning for the first prompt) of each table that is made."""
    found = []
    table = Pipeline.tabulate_prompts

    def record(self, settings):
        made = table(self, settings)
        found.append((self.name, made.entries[0]["encoder_hidden_states",].clone()))
        return made

    monkeypatch.setattr(Pipeline, "tabulate_prompts", record)
    return found


def conditioning(room: Path, text: dict[str, LowRank]) -> Tensor:
    """What diffusers' encoder of the source says of the first prompt beside its weights."""
    source = open_pipeline(room / "source")
    with run_text_encoders_beside(source, text), torch.no_grad():
        return source.pipe.encode_prompt(SETTINGS.prompts[0], "cpu", 1, False)[0]


@pytest.fixture(scope="module")
def twin(room) -> Path:
    """A pipeline of the source's text encoder, and a UNet that is a little other."""
    shutil.copytree(room / "source", room / "twin")
    unet = load_file(room / "twin/unet/diffusion_pytorch_model.safetensors")
    unet = {name: weight * 1.01 for name, weight in unet.items()}
    save_file(unet, room / "twin/unet/diffusion_pytorch_model.safetensors", {"format": "pt"})
    return room / "twin"


@pytest.mark.slow
def test_what_both_text_encoders_hold_is_carried_over_and_both_run_with_it(room, twin, seen):
    """The target is asked as it will be run: with the part that the written file holds."""
    moved = fitted(room, "twin")
    assert {name for name in moved.adapter.updates if is_in_text_encoder(name)} == set(
        parts_of(room)[1]
    )
    assert {name for name, _ in seen} == {"source", "twin"}
    beside = conditioning(room, parts_of(room)[1])
    for _, entry in seen:
        torch.testing.assert_close(entry, beside)
        assert not torch.allclose(entry, conditioning(room, {}), atol=1e-2)


@pytest.mark.slow
def test_a_kept_fit_is_used_again_with_the_same_text_part_and_not_with_another(room, tmp_path):
    """Encoders were emptied meanwhile; `again` allows a target that is the source."""

    def run(file: Path) -> prolora.Transfer:
        options = FEW | {"resume": tmp_path / "kept", "again": True}
        return prolora.fit(file, room / "source", room / "source", **options)

    first, second = run(room / "lora.safetensors"), run(room / "lora.safetensors")
    assert (first.report.probe.resumed, second.report.probe.resumed) == (0, 1)
    assert same_bits(first.adapter.updates, second.adapter.updates)
    tensors = load_file(room / "lora.safetensors")
    other = {n: 2 * t if "lora_te" in n and "up" in n else t for n, t in tensors.items()}
    save_file(other, tmp_path / "other.safetensors")
    assert run(tmp_path / "other.safetensors").report.probe.resumed == 0
