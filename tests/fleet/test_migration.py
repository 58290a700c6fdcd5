"""A collection on its way to other bases: what has its name is done, whoever did it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fleet_files import results, some_tensors, write_collection
from fresh import forks, start_fork
from safetensors.torch import save, save_file

import prolora
from prolora import Lora
from prolora.errors import InvalidOption, MissingFile, OutputError
from prolora.fleet import migration, on_ray
from prolora.moving.base_pair import BasePair

HOW = {"method": "copy"}
RAY = "ray::", "raylet", "gcs_server"


@pytest.fixture
def collection(tmp_path):
    """The LoRAs, the source, and two targets."""
    return write_collection(tmp_path)


def run(collection, folder, **how):
    """Status -> how many, of a migration."""
    loras, source, targets = collection
    found = prolora.migrate(loras, source, targets, folder, **{**HOW, **how})
    return {s: sum(m.status == s for m in found) for s in {m.status for m in found}}


def test_results_have_readable_names_and_a_second_run_does_nothing(collection, tmp_path):
    assert run(collection, tmp_path / "out") == {"moved": 8, "refused": 2}
    made = results(tmp_path / "out")
    assert len(made) == 8
    for name in made:
        target, _, file = name.partition("/")
        assert target in ("target", "target2")
        assert file.split("-")[0] in "abc" and len(file.split("-")[1]) == 12 + len(".safetensors")
    times = [file.stat().st_mtime_ns for file in sorted((tmp_path / "out").rglob("*.saf*"))]
    assert run(collection, tmp_path / "out") == {"already there": 8, "refused": 2}
    assert times == [file.stat().st_mtime_ns for file in sorted((tmp_path / "out").rglob("*.saf*"))]
    assert run(collection, tmp_path / "again") == {"moved": 8, "refused": 2}
    assert results(tmp_path / "again") == made


def test_a_refusal_is_written_beside_the_results_until_it_is_none(collection, tmp_path):
    loras, *_ = collection
    run(collection, tmp_path / "out")
    notes = sorted((tmp_path / "out").rglob("*.failed.json"))
    assert [note.parent.name for note in notes] == ["target", "target2"]
    told = json.loads(notes[0].read_text())
    assert told["lora"].endswith("notes.safetensors") and told["error"] == "unsupported-format"
    save_file(some_tensors(3, 4), loras / "notes.safetensors")
    assert run(collection, tmp_path / "out") == {"moved": 2, "already there": 8}
    assert not list((tmp_path / "out").rglob("*.failed.json"))


def flip(file, place=-1):
    """Changes one byte of a file, and neither its size nor its time."""
    before, data = file.stat(), bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def move_one(collection, folder, name="a", **how):
    """What becomes of one LoRA on its way to the first target."""
    loras, source, (target, _) = collection
    options = {**HOW, **how}
    (moved,) = prolora.migrate(loras / f"{name}.safetensors", source, target, folder, **options)
    return moved


def test_no_result_is_there_for_another_lora_of_its_name_or_another_option(collection, tmp_path):
    """One byte, with the size and time of before; test_kept_results has those of the bases."""
    lora, first = collection[0] / "a.safetensors", move_one(collection, tmp_path / "out")
    by_option = move_one(collection, tmp_path / "out", strength=0.5)
    flip(lora)
    by_lora = move_one(collection, tmp_path / "out")
    assert by_option.status == by_lora.status == "moved"
    assert len({first.out, by_option.out, by_lora.out}) == 3


@pytest.mark.parametrize("damage", ["empty", "half", "a value", "a value and its time"])
def test_a_damaged_result_is_made_again(collection, tmp_path, damage):
    first = Path(move_one(collection, tmp_path / "out").out)
    whole = first.read_bytes()
    if damage in ("empty", "half"):
        first.write_bytes(whole[: len(whole) // 2 if damage == "half" else 0])
    elif damage == "a value":
        first.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    else:
        flip(first)
    assert move_one(collection, tmp_path / "out").status == "moved"
    assert first.read_bytes() == whole


def test_a_link_in_the_place_of_a_result_is_refused_and_leads_to_no_change(collection, tmp_path):
    first = Path(move_one(collection, tmp_path / "out").out)
    mine = tmp_path / "mine.txt"
    mine.write_text("somebody's")
    first.unlink()
    first.symlink_to(mine)
    again = move_one(collection, tmp_path / "out")
    assert (again.status, mine.read_text()) == ("refused", "somebody's")
    assert first.is_symlink() and "is a link" in again.error


def test_results_are_not_read_again_unless_that_is_asked(collection, tmp_path, monkeypatch):
    run(collection, tmp_path / "out")
    read, real = [], Lora.__dict__["open"].__func__

    def watch(kind, source, metadata=None):
        lora = real(kind, source, metadata)
        return replace(lora, read=lambda key: read.append(lora.where) or lora.file.read(key))

    monkeypatch.setattr(Lora, "open", classmethod(watch))
    assert run(collection, tmp_path / "out") == {"already there": 8, "refused": 2}
    assert not read
    assert run(collection, tmp_path / "out", verify=True) == {"already there": 8, "refused": 2}
    assert len(set(read)) == 8


def test_shards_do_the_whole_together(collection, tmp_path, monkeypatch):
    monkeypatch.setattr(migration, "_BATCH", 1)
    for shard in ("1/3", "2/3", "3/3"):
        run(collection, tmp_path / "out", shard=shard)
    run(collection, tmp_path / "whole")
    assert results(tmp_path / "out") == results(tmp_path / "whole")
    for wrong in ("0/3", "4/3", "1", "a/b", "1/-3"):
        with pytest.raises(InvalidOption, match="shard"):
            run(collection, tmp_path / "out", shard=wrong)


def test_a_dry_run_writes_nothing(collection, tmp_path):
    assert run(collection, tmp_path / "out", dry_run=True) == {"would move": 8, "refused": 2}
    assert not (tmp_path / "out").exists()


def test_what_no_migration_can_do_is_refused_at_once(collection, tmp_path):
    loras, source, targets = collection
    for how in ({"method": "best"}, {"overwrite": True}):
        with pytest.raises(InvalidOption):
            run(collection, tmp_path / "out", **how)
    with pytest.raises(MissingFile):
        prolora.migrate(loras, tmp_path / "nothing", targets, tmp_path / "out")
    with pytest.raises(OutputError):
        prolora.migrate(loras, source, targets, loras / "a.safetensors", **HOW)


CODE = """
import sys, prolora
loras, source, folder, *targets = sys.argv[1:]
prolora.migrate(loras, source, targets, folder, method="copy")
"""


def start(collection, folder):
    """A process that migrates."""
    loras, source, targets = collection
    words = [sys.executable, "-c", CODE, loras, source, folder, *targets]
    return subprocess.Popen(list(map(str, words)))


def many(tmp_path, count):
    """A collection with so many LoRAs more."""
    loras, source, targets = write_collection(tmp_path)
    for number in range(count):
        save_file(some_tensors(1 + number, 12), loras / f"lora-{number}.safetensors")
    return loras, source, targets


@pytest.mark.slow
def test_kills_and_two_drivers_lose_nothing(tmp_path):
    collection = many(tmp_path, 16)
    expected = run(collection, tmp_path / "expected")["moved"]
    out, drawn = tmp_path / "out", random.Random(0)
    for _ in range(4):
        before = len(results(out)) if out.exists() else 0
        process = start(collection, out)
        while process.poll() is None and len(list(out.rglob("*.saf*"))) < before + 3:
            time.sleep(0.01)
        time.sleep(drawn.random() / 20)
        process.kill()
        process.wait()
    drivers = [start(collection, out) for _ in range(2)]
    assert [driver.wait() for driver in drivers] == [0, 0]
    assert results(out) == results(tmp_path / "expected") and len(results(out)) == expected


def processes_of(*words):
    """Those whose command has one of the words in it."""
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True)
    lines = found.stdout.splitlines()
    return {line.split()[0] for line in lines if any(word in line for word in words)}


@pytest.mark.slow
def test_ray_moves_the_same_and_a_hung_or_killed_process_takes_nothing_along(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed")
    collection = many(tmp_path, 6)
    run(collection, tmp_path / "expected")
    before = processes_of(*RAY)
    monkeypatch.setattr(on_ray, "TIME_LIMIT", 15.0)
    struck = []

    def strike(done, total, name):
        """Freezes one worker and kills another, after some results."""
        if done in (3, 6) and len(struck) < 2:
            works = [x for x in processes_of("ray::_work") if x not in struck]
            if works:
                struck.append(works[0])
                os.kill(int(works[0]), signal.SIGSTOP if len(struck) == 1 else signal.SIGKILL)

    monkeypatch.setattr(migration, "_BATCH", 4)
    counts = run(collection, tmp_path / "out", ray="local", progress=strike)
    assert len(struck) == 2 and counts["refused"] == 2
    assert results(tmp_path / "out") == results(tmp_path / "expected")
    for _ in range(100):
        if not processes_of(*RAY) - before:
            break
        time.sleep(0.1)
    assert not processes_of(*RAY) - before


def test_a_missing_ray_is_named(collection, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(prolora.ProLoRAError, match="pip install ray"):
        run(collection, tmp_path / "out", ray="local")


def test_a_lora_that_is_rewritten_while_it_moves_is_refused(collection, tmp_path, monkeypatch):
    loras, source, (target, _) = collection
    lora, plan, other = loras / "a.safetensors", BasePair.plan, save(some_tensors(3, 12))

    def exchange(pair, taken, *rest):
        lora.write_bytes(other)
        return plan(pair, taken, *rest)

    monkeypatch.setattr(BasePair, "plan", exchange)
    (moved,) = prolora.migrate(lora, source, target, tmp_path / "out", **HOW)
    assert moved.status == "refused" and "was changed while it was in use" in moved.error
    monkeypatch.undo()
    (moved,) = prolora.migrate(lora, source, target, tmp_path / "out", **HOW)
    assert moved.status == "moved" and not list((tmp_path / "out").rglob("*.failed.json"))


@forks
def test_full_disk_stops_a_migration_without_a_note(collection, tmp_path):
    """A note would blame the LoRA; a note of some hundred bytes would fit below the limit."""

    def fill():
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(OutputError, match="File too large"):
            move_one(collection, tmp_path / "out")

    assert os.waitpid(start_fork(fill), 0)[1] == 0
    assert not [path for path in (tmp_path / "out").rglob("*.json") if ".prolora" not in path.parts]
    assert move_one(collection, tmp_path / "out").status == "moved"
