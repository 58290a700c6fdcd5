"""Prompts made from the LoRA's header, for users who give none."""

from __future__ import annotations

import random

from ..adapters.trigger_words import CaptionedFolder, TrainingWords

COUNT = 12
"""Prompts that are made."""
MOST_TAGS = 12
"""Of a caption: a text encoder of 77 tokens reads about so many."""
COMMON = 0.8
"""Share of a folder's images that have a tag which counts as its trigger word."""
DIVERSE = (
    "a woman reading by a window, soft morning light",
    "a mountain lake at dawn with mist over the water",
    "an old man laughing, close-up portrait",
    "a narrow street in the rain at night, neon signs",
    "a bowl of fruit on a wooden table",
    "a dog running through tall grass",
    "a city skyline seen from a hill at sunset",
    "a knight in worn armour, full body",
    "a wooden cabin in a snowy forest",
    "a vintage car parked by the sea",
    "a child flying a kite on a beach",
    "a cup of coffee beside an open notebook, seen from above",
)
"""Everyday scenes, so that the change is seen where the LoRA was not trained, too."""


def derive_prompts(words: TrainingWords) -> tuple[str, ...]:
    """Returns captions as in the training, and everyday scenes with and without trigger.

    Of every four, two are captions drawn from the frequencies of the tags, one is a scene with the
    trigger and one without it, so that the fit sees what the LoRA does where it is not called.
    Without tags all are scenes, three in four with the trigger; without either, plain ones.
    """
    drawn = random.Random(0)
    trigger = words.trigger or _common_tag(words)
    prompts = []
    for i in range(COUNT):
        if i % 2 == 0 and words.folders:
            prompts.append(_draw_caption(words, drawn))
        else:
            prompts.append(_join(trigger if i % 4 != 3 else "", DIVERSE[i % len(DIVERSE)]))
    return tuple(prompts)


def _common_tag(words: TrainingWords) -> str:
    if not words.folders:
        return ""
    folder = max(words.folders, key=lambda folder: folder.images)
    tag, count = next(iter(folder.tags.items()))
    return tag if count >= COMMON * folder.images else ""


def _draw_caption(words: TrainingWords, drawn: random.Random) -> str:
    sizes = [folder.images for folder in words.folders]
    folder: CaptionedFolder = drawn.choices(words.folders, sizes)[0]
    tags = [tag for tag, n in folder.tags.items() if drawn.random() < n / folder.images]
    tags = tags[:MOST_TAGS] or list(folder.tags)[:1]
    called = words.trigger.casefold() in ", ".join(tags).casefold()
    return _join("" if called else words.trigger, *tags)


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
