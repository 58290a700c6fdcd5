"""The file of a plan: read whole or refused, and it never chooses where results go."""

import json
import random
from dataclasses import replace

import pytest
from fleet_files import results, seal

import prolora
from prolora.errors import ProLoRAError
from prolora.workflow.fleet.plan import Plan


@pytest.fixture
def file(plan, tmp_path):
    path = tmp_path / "plan.jsonl"
    plan.save(path)
    return path


def is_refused(path, content):
    """Whether the bytes are read as no plan; a plan that is read must be none that is smaller."""
    path.write_bytes(content)
    try:
        Plan.read(path)
    except prolora.UnsupportedFormat:
        return True
    return False


def flip(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_plan_is_read_as_it_was_written(plan, file):
    assert Plan.read(file) == plan
    head = json.loads(file.read_text().splitlines()[0])
    assert head["moves"] == 10 and head["written_by"].startswith("prolora:plan:sha256:")


def test_a_plan_that_was_cut_or_changed_anywhere_is_refused(file, tmp_path):
    content = file.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content[:-1]) if byte == ord("\n")]
    chosen = random.Random(0)
    cuts = [*ends, len(content) - 1, *chosen.sample(range(len(content)), 150)]
    assert all(is_refused(tmp_path / "cut", content[:end]) for end in cuts)
    bits = chosen.sample(range(8 * len(content)), 200)
    assert all(is_refused(tmp_path / "flipped", flip(content, bit)) for bit in bits)


@pytest.mark.slow
def test_every_cut_of_a_plan_and_3000_flips_are_refused(plan, tmp_path):
    replace(plan, entries=[*plan.entries] * 2).save(tmp_path / "plan.jsonl")
    content = (tmp_path / "plan.jsonl").read_bytes()
    assert len(content) > 3751
    assert all(is_refused(tmp_path / "cut", content[:end]) for end in range(len(content)))
    bits = random.Random(1).sample(range(8 * len(content)), 3000)
    assert all(is_refused(tmp_path / "flipped", flip(content, bit)) for bit in bits)


def test_lines_that_are_taken_out_make_another_plan_and_entries_may_be_chosen(plan, file):
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0], *lines[3:]]))
    with pytest.raises(prolora.UnsupportedFormat, match="cut or changed"):
        Plan.read(file)
    file.unlink()
    replace(plan, entries=plan.entries[2:]).save(file)
    assert len(Plan.read(file).entries) == 8


def test_a_plan_that_somebody_has_edited_is_not_replaced(plan, file):
    plan.save(file)
    file.write_bytes(file.read_bytes() + b"# a note\n")
    with pytest.raises(prolora.OutputError, match="another name"):
        plan.save(file)
    assert file.read_bytes().endswith(b"# a note\n")


ODD = [None, True, -1, 1e300, 10**40, "", "x" * 5000, "a\0b", "\ud800", "../../victim", [], {}]
ODD += [["a"], {"a": {"b": 1}}, "/victim", "..", ".", "a/b", "a\nb", float("nan")]
HEAD = ["version", "options", "bases", "notes", "moves"]
ENTRY = ["lora", "source", "target", "expert", "appended", "size", "modified", "seconds", "memory"]


def edits(lines):
    """Plans of which one value is another, as a stranger could write them, sealed."""
    head, entry = json.loads(lines[0]), json.loads(lines[1])
    for odd in ODD:
        for name in HEAD:
            yield seal([json.dumps(head | {name: odd}), *lines[1:]])
        for name in ENTRY:
            yield seal([lines[0], json.dumps(entry | {name: odd}), *lines[2:]])
        for name in ("path", "fingerprint", "family", "bytes"):
            bases = head["bases"] | {"target": head["bases"]["target"] | {name: odd}}
            yield seal([json.dumps(head | {"bases": bases}), *lines[1:]])
        for name in ("method", "rank", "match", "strength", "format", "dtype", "progress", "cache"):
            yield seal([json.dumps(head | {"options": {name: odd}}), *lines[1:]])
        if isinstance(odd, str):  # the label of a base, wherever it stands
            bases = {odd if k == "target" else k: v for k, v in head["bases"].items()}
            moved = [x.replace('"target": "target"', f'"target": {json.dumps(odd)}') for x in lines]
            yield seal([json.dumps(head | {"bases": bases}), *moved[1:]])


def snapshot(folder, out):
    """The files around the folder of the results."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if out not in path.parents}


def try_edited(content, path, out):
    """Reads a plan and does what it says: an error of ours, or nothing but results in `out`."""
    path.write_bytes(content)
    before = snapshot(path.parent.parent, out)
    try:
        plan = Plan.read(path)
        prolora.migrate(replace(plan, entries=plan.entries[:1]), out, retries=0)
    except ProLoRAError:
        pass
    assert snapshot(path.parent.parent, out).keys() - {out} == before.keys() - {out}


def test_no_edited_plan_ends_in_another_error_or_writes_outside(file, tmp_path):
    lines = file.read_text().splitlines()
    work = tmp_path / "deep" / "er"
    work.mkdir(parents=True)
    for number, content in enumerate(edits(lines)):
        if number % 4 == 0:
            try_edited(content, work / "plan.jsonl", work / "out")


@pytest.mark.slow
def test_none_of_all_edited_plans_ends_in_another_error_or_writes_outside(file, tmp_path):
    work = tmp_path / "deep" / "er"
    work.mkdir(parents=True)
    for content in edits(file.read_text().splitlines()):
        try_edited(content, work / "plan.jsonl", work / "out")


@pytest.mark.parametrize("label", ["../../victim", "/victim", "..", "a/b", "", "a\\b"])
def test_a_label_is_one_component_of_a_path(plan, label):
    bases = {label if name == "target" else name: base for name, base in plan.bases.items()}
    with pytest.raises(prolora.UnsupportedFormat, match="name of a folder"):
        replace(plan, bases=bases)


PLACES = ["loras", "loras/target", "a result", "journal", "plans", "summary.json", "failed.jsonl"]


@pytest.mark.parametrize("place", PLACES)
def test_no_link_is_followed_out_of_the_folder(plan, tmp_path, place):
    first, out, victim = tmp_path / "first", tmp_path / "out", tmp_path / "victim"
    prolora.migrate(plan, first)
    link = out / (min(results(first)) if place == "a result" else place)
    link.parent.mkdir(parents=True)
    (out / "MIGRATION.TAG").write_bytes((first / "MIGRATION.TAG").read_bytes())
    if link.suffix:
        victim.write_text("mine")
    else:
        victim.mkdir()
    link.symlink_to(victim)
    try:
        said = str(prolora.migrate(plan, out).reasons)
    except prolora.OutputError as error:
        said = str(error)
    assert "is a link" in said
    assert victim.read_text() == "mine" if link.suffix else not list(victim.iterdir())
