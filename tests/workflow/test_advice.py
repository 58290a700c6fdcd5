"""`advise`: what to do with a LoRA between two bases, from weights and from running models."""

import json
import warnings
from dataclasses import replace

import pytest
import tiny_pipelines as tiny
import torch
from mini import BLOCK, source_weights, target_along_few, write_case, write_folder

import prolora
from prolora import InvalidOption, ShapeMismatch, UnsupportedFormat
from prolora.adapters.reading import read_adapter
from prolora.probe.settings import FitSettings

FEW = FitSettings(("cat", "dog"), images=2, steps=3)


@pytest.fixture
def case(tmp_path):
    return write_case(tmp_path)


def test_the_bases_alone_are_judged_and_a_transfer_follows(case, tmp_path):
    _, source, _ = case
    target = write_folder(tmp_path / "tuned", target_along_few())
    advice = prolora.advise(source, target)
    assert advice.go and advice.lora is None and advice.measurement is None
    assert [stack.name for stack in advice.stacks()] == ["down_blocks.1"]
    assert len(advice.stacks()[0].drifts) == 2 and advice.stacks()[0].drift < 0.2
    assert (advice.verb, advice.options) == ("transfer", {})
    assert advice.expected.name == "changed"


def test_a_lora_is_placed_and_what_is_advised_runs(case, tmp_path):
    lora, source, target = case
    advice = prolora.advise(source, target, lora)
    assert (advice.lora.modules, advice.lora.paired) == (12, 8)
    assert 0.5 < advice.lora.kept_energy < 0.8 and advice.lora.stranger_energy == 0
    energies = [stack.energy for stack in advice.stacks()]
    assert sum(energies) == pytest.approx(advice.lora.kept_energy)
    out = tmp_path / "moved.safetensors"
    report = prolora.transfer_file(lora, source, target, out, **advice.options)
    assert report.totals["mapped"] == 8
    assert report.method == "copy"


def test_a_lora_in_the_place_of_a_base_is_told_so(case):
    lora, source, target = case
    for ends in ((lora, source, target), (source, lora, target)):
        with pytest.raises(UnsupportedFormat, match=r"lora\.saf.* in the place of a base"):
            prolora.advise(*ends)


def test_equal_bases_need_no_expectation(case):
    _, source, _ = case
    advice = prolora.advise(source, source)
    assert advice.expected.name == "same"


def test_unrelated_bases_get_no_options_and_strangers_are_named(case, tmp_path):
    lora, source, _ = case
    generator = torch.Generator().manual_seed(3)
    unrelated = {n: torch.randn(w.shape, generator=generator) for n, w in source_weights().items()}
    advice = prolora.advise(source, write_folder(tmp_path / "apart", unrelated), lora)
    assert not advice.go and advice.verb == ""
    assert len(advice.stacks()[0].strangers) == 3
    assert any("nothing in common" in s for s in advice.sentences())


def test_what_cannot_be_measured_is_refused_before_anything_is_read(case):
    lora, source, target = case
    with pytest.raises(InvalidOption, match="needs a LoRA"):
        prolora.advise(source, target, measure=True)
    with pytest.raises(UnsupportedFormat, match="not a pipeline folder"):
        prolora.advise(source, target, lora, measure=True)
    with pytest.raises(InvalidOption, match=r"nn\.Module"):
        prolora.advise(source, target, lora, measure=True, samplers=(print, print))


def test_a_lora_of_other_shapes_is_refused_as_transfer_refuses_it(case, tmp_path):
    lora, _, target = case
    wide = {BLOCK.format(0, "attn1.to_q"): torch.randn(48, 24)}
    with pytest.raises(ShapeMismatch):
        prolora.advise(write_folder(tmp_path / "wide", source_weights() | wide), target, lora)


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """Two pipeline folders of one UNet, another scheduler, and a LoRA."""
    folder = tmp_path_factory.mktemp("pipelines")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny.save(folder / "source")
        from prolora.probe.pipelines import open_pipeline

        pipe = open_pipeline(folder / "source").pipe
        tiny.save(folder / "twin", unet=pipe.unet, scheduler="euler")
        updates = tiny.updates(pipe.unet, ("attn1.to_v", "ff.net.2"))
        tiny.write_lora(folder / "lora.safetensors", updates)
        yield folder, pipe


def test_pipelines_are_run_and_the_measured_strength_is_advised(pipes):
    folder, pipe = pipes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        advice = prolora.advise(
            pipe,
            folder / "twin",
            folder / "lora.safetensors",
            measure=replace(FEW, guidance=1.0, target_steps=1),
        )
    assert advice.go and advice.measurement.trajectories == 4
    assert advice.measurement.calls == 2 * 3 + 2 * 1  # the target takes its own few steps
    assert advice.measured.strength == pytest.approx(1, abs=0.02)
    assert advice.measured.share == pytest.approx(1, abs=0.01)
    assert advice.options["strength"] == pytest.approx(1, abs=0.02)
    assert any(s.startswith("Go, measured on 4 trajectories") for s in advice.sentences())
    assert pipe.unet.training is False


def test_a_measurement_samples_the_prompts_that_the_header_leads_to(pipes, monkeypatch):
    """A LoRA with a trigger word does nothing where it is asked with the empty prompt."""
    from prolora.probe.pipelines import Pipeline

    folder, pipe = pipes
    seen = []
    sample = Pipeline.sample_latents
    monkeypatch.setattr(
        Pipeline,
        "sample_latents",
        lambda self, prompt, *rest: (seen.append(prompt), sample(self, prompt, *rest))[1],
    )
    lora = read_adapter(folder / "lora.safetensors")
    lora.metadata["ss_tag_frequency"] = json.dumps({"10_zorp cat": {"zorp": 10, "sitting": 4}})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prolora.advise(pipe, folder / "twin", lora, measure=replace(FEW, prompts=()))
    assert seen and any("zorp" in prompt for prompt in seen)


def test_what_is_advised_of_a_fit_says_how_the_target_is_run(pipes):
    folder, _ = pipes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny.save(folder / "apart", seed=7)
        advice = prolora.advise(
            folder / "source",
            folder / "apart",
            folder / "lora.safetensors",
            measure=replace(FEW, images=1, steps=2, target_steps=1, target_guidance=1.0),
        )
    assert not advice.go
    assert advice.verb == "fit"
    assert advice.options == {"target_steps": 1, "target_guidance": 1.0}
