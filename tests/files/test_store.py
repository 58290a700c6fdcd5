"""What is written is there as a whole or not at all, and replaces nothing unasked."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prolora.errors import OutputError, OutputExists, UnsupportedFormat
from prolora.files import store
from prolora.files.store import put, put_text


def fill(text: str):
    """A writer of a file."""
    return lambda path: path.write_text(text)


def fill_folder(**files: str):
    """A writer of a folder."""
    return lambda path: [(path / name).write_text(text) for name, text in files.items()]


def left_in(folder: Path) -> set[str]:
    return set(os.listdir(folder))


def test_what_exists_is_refused_unless_the_caller_says_overwrite(tmp_path):
    put(tmp_path / "new" / "a", fill("first"))
    with pytest.raises(OutputExists, match="overwrite=True"):
        put(tmp_path / "new" / "a", fill("second"))
    assert (tmp_path / "new" / "a").read_text() == "first"
    put(tmp_path / "new" / "a", fill("second"), overwrite=True)
    assert (tmp_path / "new" / "a").read_text() == "second" and left_in(tmp_path / "new") == {"a"}


def test_of_two_writers_of_one_name_the_first_stays(tmp_path):
    def write(path: Path) -> None:
        put_text(tmp_path / "a", "of the faster")
        path.write_text("of the slower")

    with pytest.raises(OutputExists, match="another process"):
        put(tmp_path / "a", write)
    with pytest.raises(OutputExists):
        put(tmp_path / "b", lambda path: put_text(tmp_path / "b" / "x", "faster"), folder=True)
    assert (tmp_path / "a").read_text() == "of the faster" and left_in(tmp_path) == {"a", "b"}


def test_the_same_holds_where_a_file_system_has_no_hard_links(tmp_path, monkeypatch):
    def refuse(*paths: object) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    put_text(tmp_path / "a", "one")
    with pytest.raises(OutputExists):
        put(
            tmp_path / "b",
            lambda path: [path.write_text("slower"), put_text(tmp_path / "b", "two")],
        )
    assert (tmp_path / "a").read_text() == "one" and (tmp_path / "b").read_text() == "two"


DIE = """
import os, sys
from pathlib import Path
from prolora.files.store import put_text

def refuse(*paths):
    raise PermissionError(1, "no links here")

steps = 0
def count(name):
    real = getattr(os, name)
    def step(*args, **how):
        global steps
        steps += 1
        if steps == int(sys.argv[2]):
            os._exit(9)
        return real(*args, **how)
    setattr(os, name, step)

os.link = refuse
for name in ("open", "close", "rename", "replace", "fsync", "unlink"):
    count(name)
put_text(Path(sys.argv[1], "a"), "whole")
"""


def test_a_kill_at_any_step_without_hard_links_leaves_no_name_on_what_is_not_whole(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(store, "_LOCK_SECONDS", 0.1)
    monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(PermissionError(1, "no")))
    codes = []
    for step in range(1, 20):
        folder = tmp_path / str(step)
        folder.mkdir()
        words = [sys.executable, "-c", DIE, str(folder), str(step)]
        codes.append(subprocess.run(words, check=False).returncode)
        name = folder / "a"
        assert not name.exists() or name.read_text() == "whole", step
        if not name.exists():
            time.sleep(0.15)
            put_text(name, "whole")  # what a killed process held is taken over
        if codes[-1] == 0:
            break
    assert len(codes) >= 4 and set(codes) == {0, 9}
    assert left_in(folder) == {"a"}


@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt(), UnsupportedFormat("")])
@pytest.mark.parametrize("folder", [False, True])
def test_a_failure_leaves_nothing_and_what_was_there_stays(tmp_path, error, folder):
    def fail(path: Path) -> None:
        (path / "x" if folder else path).write_text("half")
        raise error

    wanted = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OutputError
    with pytest.raises(wanted):
        put(tmp_path / "deep" / "er" / "a", fail, folder=folder)
    assert not left_in(tmp_path)
    put(tmp_path / "a", fill_folder(x="old") if folder else fill("old"), folder=folder)
    with pytest.raises(wanted):
        put(tmp_path / "a", fail, folder=folder, overwrite=True)
    assert left_in(tmp_path) == {"a"}
    assert (tmp_path / "a" / "x" if folder else tmp_path / "a").read_text() == "old"


def test_a_folder_keeps_what_is_not_written_again_and_its_last_file_comes_last(
    tmp_path, monkeypatch
):
    put(tmp_path / "a", fill_folder(config="1", weights="1"), folder=True)
    (tmp_path / "a" / "README").write_text("mine")
    with pytest.raises(OutputExists):
        put(tmp_path / "a", fill_folder(config="2", weights="2"), folder=True)
    replace, seen = os.replace, []

    def watch(source: Path, place: Path) -> None:
        """Whenever the process is killed, both old files are there, and no pair of unlike ones."""
        assert [x.read_text() for x in (tmp_path / "a").iterdir()].count("1") == 2
        seen.append((place.name, sorted(left_in(tmp_path / "a") - {"README"})))
        replace(source, place)

    monkeypatch.setattr(os, "replace", watch)
    put(tmp_path / "a", fill_folder(config="2", weights="2"), folder=True, overwrite=True)
    assert seen == [
        ("weights.old", ["config", "weights"]),
        ("config.old", ["config", "weights.old"]),
        ("config", ["config.old", "weights.old"]),
        ("weights", ["config", "config.old", "weights.old"]),
    ]
    assert left_in(tmp_path / "a") == {"README", "config", "weights"}
    assert (tmp_path / "a" / "weights").read_text() == "2"
    (tmp_path / "empty").mkdir()  # holds nothing that could be lost
    put(tmp_path / "empty", fill_folder(x="1"), folder=True)


@pytest.mark.parametrize("name", ["config", "weights"])
def test_a_folder_of_which_another_program_has_a_file_open_stays_as_it_was(
    tmp_path, monkeypatch, name
):
    put(tmp_path / "a", fill_folder(config="1", weights="1"), folder=True)
    replace = os.replace

    def refuse(source: Path, place: Path) -> None:
        if place.name in (f"{name}.old", name) and ".old" not in source.name:
            raise PermissionError(13, "Access is denied")
        replace(source, place)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(store, "_WAITS", ())
    with pytest.raises(OutputError, match="Access is denied"):
        put(
            tmp_path / "a",
            fill_folder(added="2", config="2", weights="2"),
            folder=True,
            overwrite=True,
        )
    assert {path.name: path.read_text() for path in (tmp_path / "a").iterdir()} == {
        "config": "1",
        "weights": "1",
    }
    assert left_in(tmp_path) == {"a"}


def test_what_windows_alone_refuses_is_refused_before_the_work(tmp_path, monkeypatch):
    """A file that is open is waited for, as long as readers of the cache take."""
    monkeypatch.setattr(store, "_ON_WINDOWS", True)
    rename, busy = os.rename, [2]

    def share(source: Path, place: Path) -> None:
        busy[0] -= 1
        if busy[0] >= 0:
            raise PermissionError(13, "Access is denied")
        rename(source, place)

    monkeypatch.setattr(os, "rename", share)
    put_text(tmp_path / "a", "first")
    busy[0] = 2
    put_text(tmp_path / "a", "second", overwrite=True)
    assert (tmp_path / "a").read_text() == "second"
    busy[0] = 99
    for name, said in (("a", "Access is denied"), ("style: v2", "Windows takes no such name")):
        with pytest.raises(OutputError, match=said):
            put(tmp_path / name, lambda path: pytest.fail("began"), overwrite=True)
    busy[0] = 0
    (tmp_path / "empty").mkdir()  # which another folder cannot replace there
    put(tmp_path / "empty", fill_folder(x="1"), folder=True)
    assert left_in(tmp_path) == {"a", "empty"}
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    with pytest.raises(OutputError, match="there is no drive"):
        put_text(tmp_path / "b", "nowhere")


# What nobody can catch, and the exit code after it.
KILL, KILLED = ("SIGTERM", 15) if os.name == "nt" else ("SIGKILL", -9)


def test_a_killed_writer_leaves_a_temporary_that_goes_after_an_hour(tmp_path):
    code = f"""
import os, signal
from prolora.files.store import put
put({str(tmp_path / "a")!r}, lambda path: os.kill(os.getpid(), signal.{KILL}))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == KILLED
    (left,) = tmp_path.iterdir()
    assert store.TEMPORARY_NAME.fullmatch(left.name)
    put_text(tmp_path / "b", "soon after")
    assert left.exists()
    old = time.time() - 4000
    os.utime(left, (old, old))
    store._swept.clear()  # as a later process
    put_text(tmp_path / "c", "an hour later")
    assert left_in(tmp_path) == {"b", "c"}
