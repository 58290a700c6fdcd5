"""Files written whole or not at all: what comes out, and what a failed write leaves behind."""

import errno
import os
from pathlib import Path

import pytest
import safetensors
import torch
from torch import Tensor

from prolora.errors import OutputError
from prolora.files import dtypes
from prolora.files import safetensors_writing as writing
from prolora.files.safetensors_file import SafetensorsFile
from prolora.files.safetensors_writing import write_safetensors
from prolora.files.store import check_free, put, put_text

EVERY_DTYPE = sorted(map(dtypes.find_torch_dtype, dtypes.SIZES), key=str)


def sample(dtype: torch.dtype, *shape: int) -> Tensor:
    """Any values of `dtype`."""
    values = torch.randint(0, 2 if dtype == torch.bool else 100, shape)
    return values.to(dtype)


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_the_safetensors_library_reads_what_is_written(dtype: torch.dtype, tmp_path: Path) -> None:
    """Narrow tensors before wide ones, names and metadata with letters of all kinds."""
    tensors = {
        "odd": sample(torch.uint8, 3),
        "ä \\ \n \x1f 漢": sample(dtype, 5, 3),
        "scalar": sample(dtype),
        "empty": sample(dtype, 0, 4),
        "double": sample(torch.float64, 2),
    }
    metadata = {"b": 'quote " 漢 \x00', "a": "1"}
    write_safetensors(tmp_path / "x.safetensors", tensors, metadata)
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == metadata
        assert set(file.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name).float(), tensor.float())
    ours = SafetensorsFile(tmp_path / "x.safetensors")
    assert ours.metadata == metadata and ours.tensors.keys() == tensors.keys()
    for name, info in ours.tensors.items():
        back, tensor = ours.read(name), tensors[name]
        assert info.start % info.dtype.itemsize == 0
        assert back.dtype == info.dtype == tensor.dtype
        assert back.shape == info.shape == tensor.shape
        assert torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (back, tensor)))


def test_one_content_gives_one_file(tmp_path: Path) -> None:
    """Byte for byte."""
    metadata = {str(i): "x" for i in range(50)}
    for name in "ab":
        write_safetensors(tmp_path / name, {"t": torch.ones(3), "s": torch.ones(1)}, metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_views_and_tied_tensors_are_written_whole(tmp_path: Path) -> None:
    """Transposed, sliced, shared and with NaN in them."""
    big = torch.randn(6, 4)
    tensors = {
        "whole": big,
        "again": big,
        "turned": big.T,
        "part": big[1:3],
        "nan": torch.tensor([float("nan"), -0.0]),
    }
    write_safetensors(tmp_path / "x.safetensors", tensors, {"k": "v"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.metadata == {"k": "v"}
    for name, tensor in tensors.items():
        assert torch.equal(file.read(name).view(torch.int32), tensor.contiguous().view(torch.int32))


@pytest.mark.parametrize(
    "failure",
    [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")],
    ids=["interrupt", "disk full"],
)
@pytest.mark.parametrize("step", ["dump_safetensors", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    step: str, failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever step it fails in."""
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.ones(4)}, {})
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(writing if step == "dump_safetensors" else os, step, fail)
    expected = OutputError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_safetensors(path, {"a": torch.zeros(4)}, {}, overwrite=True)
    if step != "dump_safetensors":
        with pytest.raises(expected):
            put_text(path, "text", overwrite=True)
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_a_file_that_reads_back_differently_never_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A faulty disk, played by a writer that changes one sign."""
    real = writing.dump_safetensors

    def wrong(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        real(path, {name: -tensor for name, tensor in tensors.items()}, metadata)

    monkeypatch.setattr(writing, "dump_safetensors", wrong)
    with pytest.raises(OutputError, match="a reads back differently"):
        write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(4)}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_a_written_file_has_the_mode_any_new_file_has(tmp_path: Path) -> None:
    """Others of the group can read it; a file that is replaced keeps its mode."""
    (tmp_path / "plain").touch()
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {}, {})
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    path.chmod(0o640)
    write_safetensors(path, {"a": torch.ones(1)}, {}, overwrite=True)
    assert path.stat().st_mode & 0o777 == 0o640


def test_writing_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    """It stands for what it points to."""
    (tmp_path / "disk").mkdir()
    link = tmp_path / "x.json"
    link.symlink_to(tmp_path / "disk" / "real.json")
    put_text(link, "{}")
    assert link.is_symlink()
    assert (tmp_path / "disk" / "real.json").read_text() == "{}"


def test_an_output_that_is_an_input_is_refused_by_any_name(tmp_path: Path) -> None:
    """The same path, a symbolic link, a hard link, a file of an input folder."""
    source = tmp_path / "base" / "x.safetensors"
    source.parent.mkdir()
    source.write_bytes(b"1")
    (tmp_path / "soft").symlink_to(source)
    (tmp_path / "hard").hardlink_to(source)
    for output in (
        source,
        source.parent / ".." / "base" / source.name,
        *map(tmp_path.joinpath, ["soft", "hard"]),
    ):
        with pytest.raises(OutputError, match="overwrite the input"):
            check_free(output, [tmp_path / "absent", source], overwrite=True)
    with pytest.raises(OutputError, match="overwrite the input"):
        check_free(source, [source.parent], overwrite=True)
    check_free(tmp_path / "new", [source, source.parent])
    check_free(source.parent / "new", [source.parent])


def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    """A file for a folder, a folder, a device, names no file system takes, a loop of links."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    for path in (
        tmp_path / "file" / "x",
        tmp_path / "file" / "missing" / "x",
        tmp_path,
        Path(os.devnull),
        tmp_path / ("x" * 300),
        tmp_path / "a\0b",
        tmp_path / "loop",
    ):
        with pytest.raises(OutputError):
            check_free(path)
        with pytest.raises(OutputError):
            put_text(path, "text")
    assert Path(os.devnull).is_char_device()


def test_a_missing_folder_is_made_and_vanishes_where_nothing_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x"
    check_free(path)
    assert not path.parent.exists()
    with pytest.raises(ZeroDivisionError):
        put(path, lambda _: 1 / 0)
    assert not list(tmp_path.iterdir())
    put_text(path, "text")
    assert path.read_text() == "text"


def test_no_folder_is_made_behind_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "no" / "such" / "file")
    with pytest.raises(OutputError, match="link into a folder that does not exist"):
        check_free(tmp_path / "link")
    check_free(tmp_path / "new" / "file")  # but one is made around a plain path
