"""model_index.json and the configurations of a pipeline's parts: read, or refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from property_examples import examples

import prolora
from prolora import Base
from prolora.architectures.layouts import load_layout
from prolora.bases import pipeline_files, vae
from prolora.errors import ProLoRAError, UnsupportedFormat

INDEX = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.36.0"}
INDEX |= {"requires_safety_checker": False, "safety_checker": [None, None]}
INDEX |= {"scheduler": ["diffusers", "DDIMScheduler"], "vae": ["diffusers", "AutoencoderKL"]}
INDEX |= {"unet": ["diffusers", "UNet2DConditionModel"]}
CONFIG = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256], "latent_channels": 4}
CONFIG |= {"layers_per_block": [[2, 2], 1], "in_channels": 3, "sample_size": [64, 32]}
CONFIG |= {"scaling_factor": 0.18215, "shift_factor": None, "latents_mean": [0.5, -0.25]}
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)


def write(folder: Path, content: object, name: str = "model_index.json") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder


def test_the_parts_of_a_pipeline_are_those_that_it_has(tmp_path):
    index = pipeline_files.read_pipeline_index(write(tmp_path, INDEX))
    assert index.class_name == "StableDiffusionPipeline"
    assert set(index.parts) == {"scheduler", "unet", "vae"}
    assert index.denoiser == "unet"
    absent = INDEX | {"unet": [None, None], "transformer": ["diffusers", "X"], "tags": ["a", 1, 2]}
    assert pipeline_files.read_pipeline_index(write(tmp_path, absent)).denoiser == "transformer"


@pytest.mark.parametrize("name", [None, 3, [], "", "os.system('x')", "a b", "../x", "x" * 101])
def test_a_pipeline_without_the_name_of_a_class_is_refused(tmp_path, name):
    with pytest.raises(UnsupportedFormat, match="names no class"):
        pipeline_files.read_pipeline_index(write(tmp_path, INDEX | {"_class_name": name}))


@pytest.mark.parametrize("setting", ["latent_channels", "in_channels", "block_out_channels"])
@pytest.mark.parametrize("value", [-1, 1.5, "4", True, {}, [2, "3"], 2**21, 10**400], ids=repr)
def test_a_size_of_another_kind_or_beyond_bounds_is_refused_by_name(tmp_path, setting, value):
    folder = write(tmp_path, CONFIG | {setting: value}, "config.json")
    with pytest.raises(UnsupportedFormat, match=f"config.json: {setting} must be a whole number"):
        pipeline_files.read_component_config(folder)


def test_a_file_larger_than_any_real_one_is_refused_unread(tmp_path):
    folder = write(tmp_path, INDEX | {"x": "y" * (1 << 20)})
    with pytest.raises(UnsupportedFormat, match="too large"):
        pipeline_files.read_pipeline_index(folder)


@settings(
    max_examples=examples(160),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(changes=st.dictionaries(st.sampled_from([*INDEX, *CONFIG]) | st.text(max_size=9), ANY))
def test_whatever_the_files_say_is_read_or_refused(tmp_path, changes):
    """Both files, and what is made of them: nothing but prolora's own refusals comes out."""
    for folder in (tmp_path / "a", tmp_path / "b"):
        write(folder, INDEX)
        write(folder / "vae", CONFIG, "config.json")
    write(tmp_path / "b", INDEX | changes)
    write(tmp_path / "b" / "vae", CONFIG | changes, "config.json")
    for read in (
        lambda: pipeline_files.read_pipeline_index(tmp_path / "b"),
        lambda: pipeline_files.read_component_config(tmp_path / "b" / "vae"),
        lambda: vae.explain_vae_difference(tmp_path / "a", tmp_path / "b"),
        lambda: vae.can_fit(tmp_path / "a", tmp_path / "b"),
    ):
        try:
            read()
        except ProLoRAError as refusal:
            assert "\n" not in str(refusal) and len(str(refusal)) < 600


FLOW = "FlowMatchEulerDiscreteScheduler"


def open_base(folder, scheduler=FLOW, config=None, index=None, name="model"):
    write(folder, INDEX | {"scheduler": ["diffusers", scheduler]} | (index or {}))
    if config:
        (folder / "scheduler").mkdir(exist_ok=True)
        (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    return Base(name, {}, path=folder)


def open_layout(layout):
    shapes = load_layout(layout).shapes.items()
    return prolora.open_base({k: torch.empty(shape, device="meta") for k, shape in shapes})


@pytest.mark.parametrize(
    ("scheduler", "config", "few"),
    [
        *((name, {}, True) for name in pipeline_files.FEW_STEP_SCHEDULERS),
        ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, True),  # SDXL Turbo
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, None),  # Lightning and others
        ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "linspace"}, False),
        ("DDIMScheduler", {}, False),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, None),
    ],
)
def test_the_scheduler_of_a_pipeline_shows_few_steps_many_or_nothing(
    tmp_path, scheduler, config, few
):
    base = open_base(tmp_path, scheduler, config)
    assert pipeline_files.draws_in_few_steps(base) is few
    assert pipeline_files.draws_in_few_steps(base, 4) is True
    assert pipeline_files.draws_in_few_steps(base, 50) is False


def test_a_few_step_model_is_known_by_its_size_or_its_guidance_and_else_nothing_shows_it():
    few = pipeline_files.draws_in_few_steps
    for layout in pipeline_files.FEW_STEP_LAYOUTS:
        assert few(open_layout(layout)) is True
    assert few(open_layout("flux1-dev")) is None
    guided = {"unet.time_embedding.cond_proj.weight": None}
    assert few(Base("file", {}, stored=guided)) is True
    assert few(Base("file", {})) is None and few(Base("file", {}), 4) is True


def test_a_name_with_a_word_of_few_step_models_is_noticed(tmp_path):
    names = {
        ("mine", "Tongyi-MAI/Z-Image-Turbo"): True,
        ("hyperrealism", "stabilityai/sdxl"): False,
    }
    names |= {(name, ""): True for name in ("sdxl-turbo", "SDXLTurbo_v2", "few-step", "a-4steps")}
    for (name, origin), named in (names | {("turbine 20steps", ""): False}).items():
        base = open_base(tmp_path, index={"_name_or_path": origin}, name=name)
        assert pipeline_files.is_named_few_step(base) is named, name
        assert pipeline_files.draws_in_few_steps(base) is None
