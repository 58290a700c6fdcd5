"""A disk of a few pages that really is full, where this machine lets tests mount one."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mini import write_case
from safetensors.torch import load_file, save_file

import prolora
from prolora.errors import OutputError
from prolora.files.safetensors_writing import write_safetensors
from prolora.files.store import put_text

ROOM = 64 << 10


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    tool = shutil.which("mount")
    line = [tool, "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", folder]
    done = subprocess.run(line, capture_output=True, text=True) if tool else None
    if done is None or done.returncode:
        pytest.skip(f"no file system can be mounted: {done.stderr.strip() if done else 'no mount'}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk: Path) -> None:
    """Leaves no byte free."""
    with open(disk / "ballast", "wb", buffering=0) as file, pytest.raises(OSError, match="space"):
        while True:
            file.write(bytes(4096))


def test_an_output_that_does_not_fit_leaves_the_old_one(disk: Path) -> None:
    path, text = disk / "x.safetensors", disk / "x.json"
    write_safetensors(path, {"a": torch.ones(4)}, {})
    put_text(text, "{}")
    before = path.read_bytes()
    with pytest.raises(OutputError, match="No space left"):
        write_safetensors(path, {"a": torch.zeros(ROOM)}, {}, overwrite=True)
    fill(disk)
    with pytest.raises(OutputError, match="No space left"):
        put_text(text, "x" * 5000, overwrite=True)
    assert path.read_bytes() == before and text.read_text() == "{}"
    assert sorted(os.listdir(disk)) == ["ballast", "x.json", "x.safetensors"]


def test_cache_gives_its_room_to_the_result(disk: Path, tmp_path: Path) -> None:
    """The disk has room for one of them."""
    lora, source, target = write_case(tmp_path)
    cache = disk / "cache"
    report = prolora.transfer(
        lora, source, target, method="prolora", cache=cache, out=disk / "out.safetensors"
    ).report
    assert 3 * report.totals["mapped"] == len(load_file(disk / "out.safetensors"))
    assert not [*cache.glob("bases/*")]


def test_a_lora_that_does_not_fit_stops_no_other(disk: Path, tmp_path: Path) -> None:
    lora, source, target = write_case(tmp_path)
    big, small = tmp_path / "big.safetensors", tmp_path / "small.safetensors"
    shutil.copy(lora, big)
    stem = next(iter(load_file(lora))).partition(".")[0]
    save_file({key: x for key, x in load_file(lora).items() if key.startswith(stem)}, small)
    fill(disk)
    with open(disk / "ballast", "r+b") as file:
        file.truncate(os.fstat(file.fileno()).st_size - 2 * 4096)
    outcomes = prolora.transfer_many([big, small], source, target, disk / "moved")
    assert [outcome.status for outcome in outcomes] == ["failed", "moved"]
    assert isinstance(outcomes[0].error, OutputError)
    assert [path.name for path in (disk / "moved").iterdir()] == ["small.safetensors"]
