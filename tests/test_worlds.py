"""The coloured world of bench/quality: its pictures, prompts and networks fit together."""

import sys
from pathlib import Path

import pytest
import torch

QUALITY = Path(__file__).parents[1] / "bench/quality"
pytest.importorskip("PIL")


@pytest.fixture(autouse=True)
def _scripts_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(QUALITY))
    yield
    for name in [
        n for n in sys.modules if n.split(".")[0] in ("icons", "shipped_world", "icons_world")
    ]:
        del sys.modules[name]


def test_a_prompt_is_the_number_of_its_four_words():
    from icons import words

    parts = zip(
        (words.WHAT, words.STYLE, words.INK, words.GROUND),
        ("heart", "silhouette", "ink-red", "blue"),
        strict=True,
    )
    number = words.prompt_number(*(torch.tensor(known.index(word)) for known, word in parts))
    y = torch.stack([number, torch.tensor(words.NULL_PROMPT)])
    ids = words.word_ids(y)
    read = [words.VOCABULARY[i] for i in ids[0]]
    assert read == ["heart", "silhouette", "ink-red", "on-blue"]
    assert ids[1].tolist() == [0, 0, 0, 0]
    every = torch.arange(words.PROMPTS)
    assert torch.equal(words.prompt_number(*words.prompt_parts(every)), every)


def test_no_icon_is_both_learnt_and_held_out_and_every_word_is_in_both(monkeypatch):
    from icons import drawing, words

    monkeypatch.setattr(drawing, "PICTURES", {"train": 300, "held_out": 300})
    drawing.pictures.cache_clear()
    back = drawing.kept_back()
    assert 0 < back.sum() < back.numel() / 5
    masters = drawing.masters()
    assert masters[:, :, 3].amax((2, 3)).min() > 0.5, "an icon of the sheet is empty"
    for split in ("train", "held_out"):
        layers, y = drawing.pictures(split)
        what = words.prompt_parts(y)[0]
        assert what.max() < words.WHAT.index(drawing.CONCEPT)
        assert len(what.unique()) == len(words.WHAT) - 1
        assert layers.min() >= 0 and layers.max() <= 1
    learnt, back = ({tuple(p) for p in torch.nonzero(m).tolist()} for m in (~back, back))
    assert not learnt & back


def test_the_shipped_world_has_one_icon_of_every_thing_and_set_on_both_sides():
    from icons import drawing, words
    from shipped_world import WORLD

    first = drawing.is_first_of_word()
    assert first.sum() == len(words.WHAT)
    assert [drawing.ICONS[i][1] for i in first.nonzero()[:2]] == ["grinning-face", "red-heart"]
    for split in ("train", "held_out"):
        x, y = WORLD.images("far", "neon", split)
        assert x.shape[1:] == WORLD.shape == (3, 32, 32) and x.abs().max() <= 1
        what, style, *_ = words.prompt_parts(y)
        drawn = (what * len(words.STYLE) + style).unique()
        assert len(drawn) == (len(words.WHAT) - 1) * len(words.STYLE)


def test_a_block_that_is_new_changes_nothing_at_first():
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from icons import networks

    arch = "flux"
    torch.manual_seed(0)
    source, target = networks.Painter(arch, "source"), networks.Painter(arch, "deepened")
    old = source.backbone.state_dict()
    new = {}
    for name in target.backbone.state_dict():
        weight = old[networks.origin(arch, "deepened", name)]
        silent = networks.is_silent(arch, "deepened", name)
        new[name] = weight * 0 if silent else weight
    target.backbone.load_state_dict(new)
    target.text_encoder.load_state_dict(source.text_encoder.state_dict())
    x, t, y = torch.randn(2, 3, 24, 24), torch.tensor([100.0, 900.0]), torch.tensor([5, 70])
    with torch.no_grad():
        drawn = [model(x, t, model.encode(y))[0] for model in (source, target)]
    assert len(new) > len(old)
    assert torch.allclose(*drawn, atol=1e-5)


def test_the_shipped_models_read_every_prompt_that_has_a_picture(monkeypatch):
    from icons import drawing, shipped, words

    monkeypatch.setattr(drawing, "PICTURES", {"train": 300})
    drawing.pictures.cache_clear()
    prompts = [drawing.pictures("train", concept)[1] for concept in (False, True)]
    y = torch.cat([*prompts, torch.tensor([words.NULL_PROMPT])])
    assert shipped.token_table()[y].isfinite().all()


def test_a_slice_names_what_is_out_of_order_and_what_is_not_a_number():
    from results import misplaced

    shares = {"first": 0.9, "second": 0.5, "third": 0.49, "lost": float("nan")}
    assert not misplaced(shares, [("first", "second"), ("second", "third")], 0.005)
    wrong = misplaced(shares, [("first", "second"), ("second", "third"), ("first", "lost")], 0.02)
    assert wrong == ["second (0.50) not above third (0.49)", "first (0.90) not above lost (nan)"]
