"""Outputs take their names once they are whole; what killed processes leave is removed later."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from prolora.errors import OutputError
from prolora.files import atomic
from prolora.files.atomic import remove_stale_temporaries, replace_folder
from prolora.files.writing import replace_output, write_text_atomically


def age(path: Path, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the folder's clock run on: the time of the last change of any kind cannot be set."""
    now = time.time() + seconds
    monkeypatch.setattr(atomic, "_read_clock", lambda folder: now)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_folder_is_replaced_as_one_and_keeps_what_is_not_ours(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    (folder / "samples").mkdir(parents=True)
    (folder / "samples" / "1.png").write_text("picture")
    (folder / "README.md").write_text("mine")
    (folder / "weights").write_text("old")
    (folder / "link").symlink_to("README.md")
    with replace_folder(folder) as new:
        (new / "weights").write_text("new")
        assert (folder / "weights").read_text() == "old"
    assert names(folder) == ["README.md", "link", "samples", "weights"]
    assert (folder / "weights").read_text() == "new"
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "samples" / "1.png").read_text() == "picture"
    assert (folder / "link").is_symlink()
    assert names(tmp_path) == ["adapter"]


@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "in two"])
def test_a_folder_that_cannot_be_replaced_stays_as_it_is(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "weights").write_text("old")
    real = os.replace

    def fail(old: Path, new: Path) -> None:
        if new == folder and ".tmp" in str(old):
            raise OSError(5, "Input/output error")
        real(old, new)

    monkeypatch.setattr(os, "replace", fail)
    if exchange:
        with pytest.raises(KeyboardInterrupt), replace_folder(folder) as new:
            (new / "weights").write_text("new")
            raise KeyboardInterrupt
    else:
        monkeypatch.setattr(atomic, "_exchange_names", lambda *_: False)
        with pytest.raises(OSError, match="Input"), replace_folder(folder) as new:
            (new / "weights").write_text("new")
    assert names(tmp_path) == ["adapter"] and names(folder) == ["weights"]
    assert (folder / "weights").read_text() == "old"


def test_a_folder_is_replaced_where_the_system_exchanges_no_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_exchange_names", lambda *_: False)
    test_a_folder_is_replaced_as_one_and_keeps_what_is_not_ours(tmp_path)


def test_a_folder_never_misses_where_the_system_exchanges_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads meanwhile finds all files of one version, and is never told of no folder."""
    for name in ("one", "other"):
        (tmp_path / "trial" / name).mkdir(parents=True)
    if not atomic._exchange_names(tmp_path / "trial" / "one", tmp_path / "trial" / "other"):
        pytest.skip("this system or file system exchanges no names")
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("a name was free for a moment"))
    (tmp_path / "place").mkdir()
    check_replaced(tmp_path / "place")


@pytest.mark.parametrize("below", [".", "samples"])
def test_whoever_stands_in_a_folder_that_is_replaced_stays_there(
    below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapter" / "samples").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "adapter" / below)
    before = os.stat(".").st_ino
    check_replaced(tmp_path)
    assert os.getcwd() and os.stat(".").st_ino == before


def test_a_folder_that_something_is_mounted_on_gets_the_new_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "adapter")
    (tmp_path / "adapter" / "samples").mkdir(parents=True)
    monkeypatch.setattr(atomic, "_exchange_folders", lambda *_: pytest.fail("it cannot move"))
    check_replaced(tmp_path)


def check_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    (folder / "weights").write_text("old")
    with replace_folder(folder) as new:
        (new / "weights").write_text("new")
        assert (folder / "weights").read_text() == "old"
    assert names(folder) == ["samples", "weights"] and names(tmp_path) == ["adapter"]
    assert (folder / "weights").read_text() == "new"


def killed_writer(folder: Path) -> None:
    """A process that begins a file and a folder and is killed in between."""
    code = """
        import os, signal, sys
        from pathlib import Path
        from prolora.files.atomic import replace_file, replace_folder
        folder = Path(sys.argv[1])
        with replace_file(folder / "x") as one, replace_folder(folder / "y") as two:
            one.write_text("half")
            (two / "z").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(folder)])
    assert run.returncode == -signal.SIGKILL


def test_what_a_killed_process_left_is_removed_by_the_next_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_writer(tmp_path)
    assert len(list(tmp_path.glob(".prolora-*.tmp"))) == 2
    write_text_atomically(tmp_path / "a", "at once")
    assert len(list(tmp_path.glob(".prolora-*.tmp"))) == 2  # a lock may be on its way for so long
    age(tmp_path, 61, monkeypatch)
    write_text_atomically(tmp_path / "a", "a minute later")
    assert names(tmp_path) == ["a"]


def test_nothing_else_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other names, links, and what a process is still working on."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "picture").touch()
    for name in (
        ".prolora-notes.tmp",
        ".prolora-0123456789abcdef",
        ".prolora-0123456789ABCDEF.tmp",
    ):
        (tmp_path / name).touch()
    (tmp_path / ".prolora-00000000000000aa.tmp").symlink_to(other)
    before = names(tmp_path)
    with replace_output(tmp_path / "x") as file, replace_output(tmp_path / "y", folder=True) as new:
        file.write_text("1")
        (new / "z").write_text("1")
        age(tmp_path, 10 * 86_400, monkeypatch)
        remove_stale_temporaries(tmp_path)
        assert file.exists() and new.exists()
    assert names(tmp_path) == sorted([*before, "x", "y"])
    assert (other / "picture").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="users have no numbers there")
def test_what_another_user_left_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".prolora-0000000000000000.tmp").touch()
    (tmp_path / ".prolora-0000000000000001.tmp").mkdir()
    age(tmp_path, 10 * 86_400, monkeypatch)
    monkeypatch.setattr(os, "getuid", lambda: os.stat(tmp_path).st_uid + 1)
    remove_stale_temporaries(tmp_path)
    assert len(names(tmp_path)) == 2
    monkeypatch.undo()
    age(tmp_path, 10 * 86_400, monkeypatch)
    remove_stale_temporaries(tmp_path)
    assert not names(tmp_path)


def test_without_locks_an_hour_must_have_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".prolora-0000000000000000.tmp").touch()
    link = tmp_path / ".prolora-0000000000000001.tmp"
    link.symlink_to(tmp_path)
    monkeypatch.setattr(atomic, "_lock", lambda _: None)
    age(tmp_path, 3500, monkeypatch)
    remove_stale_temporaries(tmp_path)
    assert len(names(tmp_path)) == 2
    age(tmp_path, 3700, monkeypatch)
    remove_stale_temporaries(tmp_path)
    assert names(tmp_path) == [link.name]


def test_without_locks_a_clock_that_is_hours_ahead_removes_nothing_of_a_live_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 7200)
    monkeypatch.setattr(atomic, "_lock", lambda _: None)
    with replace_output(tmp_path / "x") as live:
        live.write_text("half")
        remove_stale_temporaries(tmp_path)
        assert names(tmp_path) == [live.name]
    assert names(tmp_path) == ["x"]


@pytest.mark.skipif(
    sys.platform == "win32" or os.getuid() == 0,
    reason="root may write everywhere",
)
def test_a_folder_without_permission_is_refused_with_the_way_out(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(OutputError, match="closed"):
        write_text_atomically(closed / "x", "text")


def test_a_text_with_the_bytes_of_a_file_name_that_is_no_text_is_written(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write_text_atomically(tmp_path / "x", name)
    assert (tmp_path / "x").read_text() == "caf?"
