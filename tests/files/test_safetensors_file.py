"""safetensors files: what is read, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from property_examples import examples
from torch import Tensor

import prolora
from prolora.errors import UnsupportedFormat
from prolora.files import dtypes
from prolora.files.safetensors_file import SafetensorsFile
from prolora.files.safetensors_writing import write_safetensors
from prolora.files.shared_file import SharedFile

E8M0 = "float8_e8m0fnu"  # which torch has since 2.7
NAMES = [name for name in dtypes.SIZES if name != "F8_E8M0" or hasattr(torch, E8M0)]
DTYPES = sorted(map(dtypes.find_torch_dtype, NAMES), key=str)
FAST = settings(
    max_examples=examples(300),
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def sample(dtype: torch.dtype, *shape: int) -> Tensor:
    """Any values of `dtype`."""
    values = torch.randint(0, 2 if dtype == torch.bool else 100, shape)
    return values.to(dtype)


def file_of(path: Path, header: object, data: bytes = b"") -> Path:
    """A file with `header` as its JSON (or its raw bytes)."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize("by_position", [True, False])  # Windows has no such reads
def test_rows_are_the_rows_of_the_whole(
    by_position: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any axis count from one up."""
    if not by_position:
        monkeypatch.delattr(os, "preadv", raising=False)
    tensors = {"conv": sample(torch.float16, 6, 2, 3, 3), "vector": sample(torch.int64, 7)}
    write_safetensors(tmp_path / "x.safetensors", tensors, {})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(file.read_rows(name, 2, 5), tensor[2:5])
        assert file.read_rows(name, 3, 3).shape == tensor[3:3].shape
        with pytest.raises(IndexError, match=name):
            file.read_rows(name, 2, len(tensor) + 1)


def test_a_tensor_that_begins_at_an_odd_byte_is_read(tmp_path: Path) -> None:
    """With others, where all are views of one buffer, and alone."""
    header = {"x": entry(0, 1, [1], "U8"), "y": entry(1, 9, [2]), "z": entry(9, 13, [1], "I32")}
    data = b"\7" + torch.tensor([0.5, -2.0]).numpy().tobytes() + b"\3\0\0\0"
    file = SafetensorsFile(file_of(tmp_path / "x.safetensors", header, data))
    for tensors in (file.read_all(), {name: file.read(name) for name in header}):
        assert [one.tolist() for one in tensors.values()] == [[7], [0.5, -2.0], [3]]


def test_numbers_that_this_torch_lacks_are_refused(tmp_path: Path, monkeypatch) -> None:
    path = file_of(tmp_path / "x.safetensors", {"x": entry(0, 2, [2], "F8_E8M0")}, b"ab")
    monkeypatch.delattr(torch, E8M0, raising=False)
    with pytest.raises(UnsupportedFormat, match="F8_E8M0 need a newer torch"):
        SafetensorsFile(path).read("x")


def test_a_refused_file_is_closed_though_its_error_is_kept(tmp_path: Path, monkeypatch) -> None:
    """On Windows an open file can be neither replaced nor deleted."""
    path, closed, close = tmp_path / "x.safetensors", [], SharedFile.close
    monkeypatch.setattr(SharedFile, "close", lambda self: (closed.append(self._path), close(self)))
    path.write_bytes(b"nothing")
    with pytest.raises(UnsupportedFormat) as kept:
        prolora.check(path)
    assert closed.count(path) == 1 and kept.value
    path.unlink()


def test_a_cut_off_file_names_the_first_tensor_that_is_incomplete(tmp_path: Path) -> None:
    """Wherever it is cut."""
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.ones(8), "b": torch.ones(8), "c": torch.ones(8)}, {})
    whole = path.read_bytes()
    for missing, name in [(1, "c"), (32, "c"), (33, "b"), (64, "b"), (96, "a")]:
        path.write_bytes(whole[:-missing])
        with pytest.raises(UnsupportedFormat, match=rf"cut off: {name} .*download it again"):
            SafetensorsFile(path)
    path.write_bytes(whole[:30])
    with pytest.raises(UnsupportedFormat, match=r"cut off inside its header.*download it again"):
        SafetensorsFile(path)
    path.write_bytes(b"")
    with pytest.raises(UnsupportedFormat, match="empty"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, "b overlaps"),
        ({"a": entry(0, 8, [2]), "b": entry(12, 16, [1])}, "b leaves a hole"),
        ({"a": entry(0, 8, [2])}, "8 unknown bytes after"),
        ({"a": entry(0, 16, [5])}, "a: bytes 0 to 16 do not fit"),
        ({"a": entry(16, 0, [4])}, "a: bytes 16 to 0 do not fit"),
        ({"a": entry(0, 16, [2**40, 2**40])}, "a has an impossible shape"),
        ({"a": entry(0, 0, [0, 2**40, 2**40])}, "a has an impossible shape"),
        ({"a": entry(0, 16, [-2, -2])}, "damaged at a"),
        ({"a": entry(0, 16, [4.0])}, "damaged at a"),  # type: ignore[list-item]
        ({"a": entry(0, 16, [True] * 4)}, "damaged at a"),
        ({"a": entry(0, 16, [4], "F4")}, "a has the unknown dtype 'F4'"),
        ({"a": {"dtype": "F32"}}, "damaged at a"),
        ({"a": 3}, "damaged at a"),
        ({"__metadata__": {"k": 1}}, "metadata is not text"),
        ({"__metadata__": None}, "metadata is not text"),
        (b'{"a": 1, "a": 2}', "a name occurs twice"),
        (b'{"\\ud800": 1}', "damaged"),
        (b'{"a": ' + b"[" * 100_000, "damaged"),
        (b'{"\xff": 1}', "damaged"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(
    header: object, message: str, tmp_path: Path
) -> None:
    """Each with words of its own."""
    with pytest.raises(UnsupportedFormat, match=message):
        SafetensorsFile(file_of(tmp_path / "x.safetensors", header, bytes(16)))


def test_an_absurd_header_length_allocates_nothing(tmp_path: Path) -> None:
    """2^63 bytes would not fit anywhere."""
    path = tmp_path / "x.safetensors"
    for length in (2**63, 2**64 - 1, 100_000_001):
        path.write_bytes(length.to_bytes(8, "little") + b'{"a": 1}')
        with pytest.raises(UnsupportedFormat, match="not a safetensors file"):
            SafetensorsFile(path)
    path.write_bytes((2**25 + 1).to_bytes(8, "little") + b'{"a": 1}')
    with pytest.raises(UnsupportedFormat, match="33554433 bytes, more than any real one"):
        SafetensorsFile(path)


@FAST
@given(
    edits=st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3)), min_size=1, max_size=4)
)
def test_damaged_bytes_give_a_file_or_a_typed_error(
    edits: list[tuple[int, bytes]], tmp_path: Path
) -> None:
    """Bytes replaced, inserted or lost anywhere, the length included."""
    tensors = {"up": torch.ones(4, 2).half(), "down": torch.ones(2, 3), "alpha": torch.tensor(1.0)}
    raw = bytearray(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    for place, new in edits:
        place %= len(raw)
        raw[place : place + (1 if len(new) < 2 else len(new))] = new
    assert_safe(tmp_path, bytes(raw))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 24)
    | st.floats()
    | st.text()
    | st.sampled_from(["F32", "F16", "BOOL"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner)
    ),
    max_leaves=8,
)


@FAST
@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__"]),
        JSON
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F16", "BOOL", "F8_E5M2", "F99"]) | JSON,
                "shape": st.lists(st.integers(-1, 4) | st.integers(), max_size=3) | JSON,
                "data_offsets": st.lists(st.integers(-1, 24), min_size=2, max_size=2) | JSON,
            }
        ),
        max_size=3,
    )
)
def test_an_invented_header_gives_a_file_or_a_typed_error(header: object, tmp_path: Path) -> None:
    """Right JSON, wrong content."""
    raw = json.dumps(header).encode()
    assert_safe(tmp_path, len(raw).to_bytes(8, "little") + raw + bytes(24))


def assert_safe(folder: Path, content: bytes) -> None:
    """Opening refuses with a typed error, or gives tensors that the safetensors library gives."""
    path = folder / "fuzzed.safetensors"
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
    except UnsupportedFormat as error:
        assert str(path) in str(error)
        return
    with safetensors.safe_open(path, "pt") as oracle:
        assert set(oracle.keys()) == file.tensors.keys()
        for name in file.tensors:
            assert file.read(name).shape == oracle.get_tensor(name).shape


def test_a_pickle_is_refused_with_a_command_that_converts_it(tmp_path: Path) -> None:
    """The command is run here, on a path with a blank and on both kinds of pickle."""
    path = tmp_path / "my model.ckpt"
    shared = torch.arange(6.0).reshape(2, 3)
    for new_format in (True, False):
        torch.save(
            {"state_dict": {"a": shared, "b": shared, "step": 3}},
            path,
            _use_new_zipfile_serialization=new_format,
        )
        with pytest.raises(UnsupportedFormat, match="weights_only=True") as refused:
            SafetensorsFile(path)
    command = str(refused.value).splitlines()[-1]
    assert command.startswith("python ")
    subprocess.run(f"{sys.executable} {command[7:]}", shell=True, check=True)
    assert torch.equal(SafetensorsFile(path.with_suffix(".safetensors")).read("b"), shared)


def test_a_header_that_starts_like_a_pickle_is_still_read(tmp_path: Path) -> None:
    """A header of 640 bytes begins with 0x80 0x02, the mark of a pickle."""
    raw = json.dumps({"__metadata__": {"k": ""}}).encode()
    file_of(tmp_path / "x.safetensors", raw[:-3] + b"v" * (640 - len(raw)) + raw[-3:])
    assert (tmp_path / "x.safetensors").read_bytes()[:2] == b"\x80\x02"
    assert SafetensorsFile(tmp_path / "x.safetensors").metadata["k"] == "v" * (640 - len(raw))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF\3\0\0\0\0\0", "base models are read from GGUF"),
        *(
            (start, r"[/\\]x: a web page.*login")
            for start in (b"<!DOCTYPE html>", b"<html>", b"<!doctype html>")
        ),
    ],
)
def test_other_formats_are_refused_by_name(content: bytes, message: str, tmp_path: Path) -> None:
    """An HTML page is what a failed download often is."""
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UnsupportedFormat, match=message):
        SafetensorsFile(tmp_path / "x")


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    """A folder, a pipe nobody writes to, a missing file, an impossible name."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing", Path("a\0b")):
        with pytest.raises(UnsupportedFormat):
            SafetensorsFile(path)


def test_a_file_replaced_while_open_is_noticed(tmp_path: Path) -> None:
    """Reading on at the old offsets would give plausible nonsense."""
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.ones(4)}, {})
    file = SafetensorsFile(path)
    write_safetensors(path, {"a": torch.zeros(4)}, {}, overwrite=True)
    with pytest.raises(UnsupportedFormat, match="changed while it was in use"):
        file.read("a")


@pytest.mark.slow
def test_reading_one_after_the_other_needs_the_room_of_one(tmp_path: Path) -> None:
    """In a process of its own: 200 MB in 2 MB tensors must not stay resident, as a map would."""
    path = tmp_path / "x.safetensors"
    tensors = {f"t{i}": torch.ones(1 << 19) for i in range(100)}
    safetensors.torch.save_file(tensors, path)
    program = (
        "import resource, sys\n"
        "from prolora.files.safetensors_file import SafetensorsFile\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "file = SafetensorsFile(sys.argv[1])\n"
        "file.read('t0'); before = peak()\n"
        "for name in file.tensors: file.read(name)\n"
        "print(peak() - before)"
    )
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", program, path],
        env={**os.environ, "PYTHONPATH": paths},
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(done.stdout) < 20
