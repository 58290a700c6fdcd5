"""Where no prompts are given, models are asked with those that a LoRA's header leads to."""

from __future__ import annotations

import json

import pytest
import tiny_pipelines as tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import prolora
from prolora.adapters.trigger_words import CaptionedFolder, TrainingWords, read_trigger_words
from prolora.fitting.default_prompts import COUNT, DIVERSE, derive_prompts
from prolora.fitting.pipelines.pipeline import Pipeline
from prolora.fitting.pipelines.pipeline_opening import open_pipeline

TAGS = {"sks cat": 20, "grass": 10, "night": 1}


def test_half_are_captions_and_of_the_scenes_half_are_without_the_trigger():
    prompts = derive_prompts(TrainingWords("", (CaptionedFolder(20, TAGS),)))
    assert len(prompts) == COUNT
    assert all(set(prompt.split(", ")) <= TAGS.keys() for prompt in prompts[::2])
    assert all(prompt.startswith("sks cat") for prompt in prompts[::2])
    assert {"grass" in prompt for prompt in prompts[::2]} == {True, False}
    assert all(prompt == f"sks cat, {DIVERSE[1 + 4 * i]}" for i, prompt in enumerate(prompts[1::4]))
    assert all(prompt == DIVERSE[3 + 4 * i] for i, prompt in enumerate(prompts[3::4]))


def test_a_phrase_of_the_author_is_the_trigger_and_stands_in_every_caption_once():
    words = TrainingWords("Sks Cat", (CaptionedFolder(20, {"grass": 15, "sks cat": 9}),))
    prompts = derive_prompts(words)
    assert all(prompt.casefold().count("sks cat") == 1 for prompt in prompts[::2])
    assert all(prompt.startswith("Sks Cat, ") for prompt in prompts[1::4])
    alone = derive_prompts(TrainingWords("zwx"))
    assert [("zwx" in prompt) for prompt in alone] == [True, True, True, False] * (COUNT // 4)


def test_a_tag_of_few_images_is_no_trigger_and_no_header_gives_plain_scenes():
    folders = (CaptionedFolder(20, {"grass": 8, "sky": 7}), CaptionedFolder(3, {"car": 3}))
    assert derive_prompts(TrainingWords("", folders))[1::4] == DIVERSE[1::4]
    assert derive_prompts(TrainingWords()) == DIVERSE[:COUNT]
    assert len(set(DIVERSE)) == len(DIVERSE) >= COUNT


@pytest.mark.slow
@given(st.lists(st.dictionaries(st.text(min_size=1), st.integers(1, 10**12), max_size=40)))
def test_any_tags_make_prompts(tables):
    header = {"ss_tag_frequency": json.dumps({str(i): table for i, table in enumerate(tables)})}
    prompts = derive_prompts(read_trigger_words(header))
    assert len(prompts) == COUNT and all(prompts)
    assert prompts == derive_prompts(read_trigger_words(header))


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    for seed in (0, 5):
        tiny.save(folder / str(seed), seed=seed)
    unet = open_pipeline(folder / "0").denoiser
    file = tiny.write_lora(folder / "lora.safetensors", tiny.updates(unet, ("ff.net.2",)))
    header = {"ss_tag_frequency": json.dumps({"10_sks": {"cat": 9, "dog": 3}})}
    save_file(load_file(file), folder / "tagged.safetensors", header)
    return folder


def test_both_models_are_asked_with_them_where_no_prompts_are_given(room, monkeypatch):
    asked = []
    sample = Pipeline.sample_latents

    def record(self, prompt, *rest, **more):
        asked.append(prompt)
        return sample(self, prompt, *rest, **more)

    monkeypatch.setattr(Pipeline, "sample_latents", record)
    moved = prolora.fit(
        room / "tagged.safetensors",
        room / "0",
        room / "5",
        images=2,
        steps=1,
        fit_steps=1,
        force=True,
    )
    prompts = derive_prompts(
        read_trigger_words({"ss_tag_frequency": '{"a": {"cat": 9, "dog": 3}}'})
    )
    said = " ".join(moved.report.sentences())
    assert set(prompts) <= set(asked) <= {*prompts, ""}
    assert moved.report.probe.derived_prompts == prompts
    assert "No prompts were given; 12 were made" in said and prompts[0] in said
    assert moved.adapter.metadata["prolora.probe_prompts"] == "12"
