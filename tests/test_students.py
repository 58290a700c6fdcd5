"""The study of few-step students in bench/quality runs, and its scores mean what they say."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch

QUALITY = Path(__file__).parents[1] / "bench/quality"
pytest.importorskip("diffusers", reason="diffusers, whose models the study trains, is missing")
pytest.importorskip("peft", reason="peft, which trains the study's LoRAs, is missing")


@pytest.fixture
def students(monkeypatch):
    """The script; the study's modules are imported anew, and leave nothing behind."""
    monkeypatch.syspath_prepend(str(QUALITY))
    before = set(sys.modules)
    import students

    monkeypatch.setattr(students, "PATHS", 8)
    monkeypatch.setattr(students, "ORACLE_PATHS", 8)
    yield students
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(str(QUALITY)):
            del sys.modules[name]


@pytest.fixture
def folder(students, tmp_path):
    """A source with random weights and its LoRA, in a world of few steps."""
    from judge import Judge
    from models import Folder, save_lora
    from safetensors.torch import save_file

    from prolora import LowRank

    world = students.student_world("digits")
    budgets = world.budgets | {"lora": (2, 1e-3)}
    world = dataclasses.replace(world, budgets=budgets, judged_rows=8, teacher_steps=2)
    folder = Folder(world, tmp_path, students.ARCH)
    (tmp_path / students.ARCH).mkdir()
    torch.manual_seed(0)
    source = world.new_model(students.ARCH, "source")
    save_file(source.state_dict(), folder.model_path("source", 0))
    lora = {}
    for name, module in source.backbone.named_modules():
        if re.fullmatch(world.adapted[students.ARCH], name):
            m, n = module.weight.shape
            lora[name] = LowRank(torch.randn(m, 2) / 8, torch.randn(2, n) / 8)
    save_lora(lora, folder.lora_path("source", 0, "thick"))
    save_file(Judge(world).state_dict(), tmp_path / "judge.safetensors")
    return folder


@pytest.mark.parametrize("way", ["endpoint", "consistency", "matching"])
def test_a_student_goes_on_where_it_was_stored(students, folder, way):
    folder.root.joinpath("students").mkdir()
    paths = students.place(folder, "paths-plain-train.safetensors")
    students.make_paths(folder, students.PLAIN, "train", paths)
    kept = [students.place(folder, f"{way}-{length}.pt") for length in (1, 3)]
    students.distil(folder, way, None, 1, kept[0])
    students.distil(folder, way, kept[0], 3, kept[1])
    one, three = (torch.load(path, weights_only=True) for path in kept)
    assert (one["done"], three["done"]) == (1, 3)
    source = folder.load_model("source", 0).state_dict()
    for part, learns in (("student", True), ("average", True), ("fake", way == "matching")):
        for before, after in ((source, one), (one[part], three)):
            changed = any(not torch.equal(before[n], w) for n, w in after[part].items())
            assert changed == learns, (part, learns)
    assert {int(state["step"]) for state in three["optimiser"]["state"].values()} == {3}


@pytest.mark.slow
def test_a_student_is_scored_beside_its_teacher(students, folder):
    from jobs import run_jobs
    from results import Table

    run_jobs(list(students.make_jobs(folder, ["consistency"], [1], ["thick"], [])))
    collected = students.collect(folder, {})
    (row,) = collected["rows"]
    assert row["kind"] == "consistency-1"
    assert row["follows"]["none"] == 0
    assert row["losses"]["copy @ 1"] != row["none"]
    assert json.loads(json.dumps(collected)) == collected
    out = students.place(folder, "consistency-1-thick-fit.json")
    sizes = {"images": 4, "sampler_steps": 2, "probes": 24, "held_out": 12, "batch": 12, "steps": 1}
    students.fit(folder, "consistency-1", "thick", out, **sizes)
    (row,) = students.collect(folder, collected)["rows"]
    assert row["fit"]["by_images"]
    assert set(row["fit"]["drawn"]) == {"follows"}
    table = students.shares_table(Table([row]))
    assert "consistency | 1 |" in table
    assert f"| {row['fit']['score']:.2f} [" in table


def test_an_end_that_is_reached_from_every_state_has_no_loss(students, folder):
    students.make_paths(folder, students.PLAIN, "held_out", folder.root / "plain.safetensors")
    from safetensors.torch import load_file

    made = students.Paths(folder.world, **load_file(folder.root / "plain.safetensors"))

    class Knows(torch.nn.Module):
        """Answers with the velocity that leads to the end of the path that it is asked at."""

        def forward(self, x, time, tokens, return_dict=False):
            t = time / 1000
            near = (made.states[:, :-1, None] - x).square().sum((3, 4, 5)).amin(1).argmin(0)
            return ((x - made.states[near, -1]) / t[:, None, None, None],)

    assert made.held_out(Knows()) < 1e-8
    drawn = folder.world.sample(folder.load_model("source", 0), made.y, 2, 2.0, 99)
    torch.testing.assert_close(made.states[:, -1].clamp(-1, 1), drawn)


def test_images_of_the_target_are_asked_about_at_late_times_only(students, monkeypatch):
    import another_look

    calls = []

    class Model(torch.nn.Module):
        def forward(self, x, time, tokens, return_dict=False):
            calls.append((self, x, time / 1000))
            return (torch.zeros_like(x),)

    class World:
        guidance = 2.0
        draw_prompts = staticmethod(lambda n, generator, concept: torch.zeros(n, dtype=torch.long))
        tokens = staticmethod(lambda model, y: y)

        def sample(self, model, y, steps, guidance, seed):
            assert model is not target, "the drawing itself would be recorded, too"
            return torch.full((len(y), 1, 2, 2), 100.0)

    target, source = Model(), Model()
    for model in (source, target):
        another_look.TargetImages(World(), model, target, "neon", 0.5)(0)
    asked = {model: [c for c in calls if c[0] is model] for model in (source, target)}
    for model, (_, x, t) in ((m, c) for m in asked for c in asked[m]):
        assert 0 <= t.min() and t.max() < 0.5, model
        assert ((x - (1 - t[:, None, None, None]) * 100).abs() < 6).all(), "not noised images"
    assert len(asked[source]) == len(asked[target]) == another_look.AGAIN


def test_the_pages_have_the_tables_of_the_stored_rows(students):
    import another_look
    from evidence import fill_page

    tables = students.stored_tables()
    page = students.PAGE.read_text("utf-8")
    assert fill_page(page, tables) == page
    assert all(f"<!-- {name} -->" in page for name in tables)
    looks = another_look.looks_table(json.loads(another_look.RESULTS.read_text())["rows"])
    page = another_look.PAGE.read_text("utf-8")
    assert f"<!-- another look -->\n\n{looks}\n\n<!-- end -->" in page
