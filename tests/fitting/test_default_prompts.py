"""Where no prompts are given, models are asked with those that a LoRA's header leads to."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import prolora
from prolora.adapters.trigger_words import CaptionedFolder, TrainingWords, read_trigger_words
from prolora.fitting.default_prompts import derive_prompts
from prolora.fitting.pipelines.pipeline import Pipeline

TAGS = {"sks cat": 20, "grass": 10, "night": 1}


def prompts_of(*folders: tuple[int, dict[str, int]], phrase: str = "") -> tuple[str, ...]:
    """Those of a header with a trigger phrase, and of each folder its images and tags."""
    return derive_prompts(TrainingWords(phrase, tuple(CaptionedFolder(*one) for one in folders)))


SCENES = prompts_of()


def test_half_are_captions_and_of_the_scenes_half_are_without_the_trigger():
    prompts = prompts_of((20, TAGS))
    assert len(prompts) == 12
    assert all(set(prompt.split(", ")) <= TAGS.keys() for prompt in prompts[::2])
    assert all(prompt.startswith("sks cat") for prompt in prompts[::2])
    assert {"grass" in prompt for prompt in prompts[::2]} == {True, False}
    assert all(prompt == f"sks cat, {SCENES[1 + 4 * i]}" for i, prompt in enumerate(prompts[1::4]))
    assert prompts[3::4] == SCENES[3::4]


def test_a_phrase_of_the_author_is_the_trigger_and_stands_in_every_caption_once():
    prompts = prompts_of((20, {"grass": 15, "sks cat": 9}), phrase="Sks Cat")
    assert all(prompt.casefold().count("sks cat") == 1 for prompt in prompts[::2])
    assert all(prompt.startswith("Sks Cat, ") for prompt in prompts[1::4])
    alone = prompts_of(phrase="zwx")
    assert [("zwx" in prompt) for prompt in alone] == [True, True, True, False] * 3


def test_a_tag_of_few_images_is_no_trigger_and_no_header_gives_plain_scenes():
    assert prompts_of((20, {"grass": 8, "sky": 7}), (3, {"car": 3}))[1::4] == SCENES[1::4]
    assert len(set(SCENES)) == 12


@pytest.mark.slow
@given(st.lists(st.dictionaries(st.text(min_size=1), st.integers(1, 10**12), max_size=40)))
def test_any_tags_make_prompts(tables):
    header = {"ss_tag_frequency": json.dumps({str(i): table for i, table in enumerate(tables)})}
    prompts = derive_prompts(read_trigger_words(header))
    assert len(prompts) == 12 and all(prompts)
    assert prompts == derive_prompts(read_trigger_words(header))


def test_both_models_are_asked_with_them_where_no_prompts_are_given(ends, tmp_path, monkeypatch):
    header = {"ss_tag_frequency": json.dumps({"10_sks": {"cat": 9, "dog": 3}})}
    save_file(load_file(ends[0]), tmp_path / "tagged.safetensors", header)
    asked = []
    sample = Pipeline.sample_latents

    def record(self, prompt, *rest, **more):
        asked.append(prompt)
        return sample(self, prompt, *rest, **more)

    monkeypatch.setattr(Pipeline, "sample_latents", record)
    few = {"images": 2, "steps": 1, "fit_steps": 1, "force": True}
    moved = prolora.fit(tmp_path / "tagged.safetensors", *ends[1:], **few)
    prompts = prompts_of((9, {"cat": 9, "dog": 3}))
    said = " ".join(moved.report.sentences())
    assert set(prompts) <= set(asked) <= {*prompts, ""}
    assert moved.report.probe.derived_prompts == prompts
    assert "No prompts were given; 12 were made" in said and prompts[0] in said
    assert moved.adapter.metadata["prolora.probe_prompts"] == "12"
