"""What several rooms ask of files: hashes, states, JSON objects, and errors that say what to do."""

import difflib
import errno
import hashlib
import os
import re
from pathlib import Path

import pytest
import torch

import prolora
from prolora.errors import MissingFile, OutputError, UnsupportedFormat, input_error, output_error
from prolora.files.hashing import hash_file, hash_parts, hash_text
from prolora.files.jsontext import parse_json_object, read_json_object


def test_hashes_are_those_of_sha256(tmp_path: Path) -> None:
    """Texts, tensors of any layout, whole files and pieces of them."""
    content = os.urandom((1 << 20) + 17)
    (tmp_path / "x").write_bytes(content)
    assert hash_file(tmp_path / "x") == hashlib.sha256(content).hexdigest()
    assert hash_file(tmp_path / "x", 5, 1 << 20) == hash_parts([content[5 : 5 + (1 << 20)]])
    assert hash_file(tmp_path / "x", 1 << 21) == hash_text("")
    tensor = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    stored = tensor.T.contiguous().view(torch.int16).numpy().tobytes()
    assert hash_parts(["ä", tensor.T]) == hashlib.sha256("ä".encode() + stored).hexdigest()
    with pytest.raises(UnsupportedFormat, match="missing: no such file"):
        hash_file(tmp_path / "missing")


@pytest.mark.parametrize(
    "text",
    [b"", b"[1]", b"{", b"{]", b"\xff{}", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"],
    ids=["empty", "list", "open", "damaged", "not UTF-8", "deep", "a number of 5000 digits"],
)
def test_what_is_no_json_object_is_refused_by_name(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(UnsupportedFormat, match=r"x\.json: (is damaged: not JSON|holds no JSON)"):
        read_json_object(tmp_path / "x.json")
    with pytest.raises(UnsupportedFormat, match=r"the note: (is damaged: not JSON|holds no JSON)"):
        parse_json_object(text, "the note")


def test_a_missing_file_is_told_with_what_is_called_alike_there(tmp_path: Path) -> None:
    for name in ("style.safetensors", "b.safetensors"):
        (tmp_path / name).touch()
    for path, said in (
        (tmp_path / "stile.safetensors", r"no such file\. Similar here: style\.safetensors$"),
        (tmp_path / "x.json", "no such file$"),
        (tmp_path / "no" / "x", "no such file; there is no folder .*no to read$"),
        ("https:/example.org/x", r"^https://example\.org/x: an address on the web"),
    ):
        error = input_error(path, FileNotFoundError(errno.ENOENT, "No such file"))
        assert isinstance(error, MissingFile) and re.search(said, str(error)), error


def test_few_of_a_folder_s_names_are_compared_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All were: beside ten thousand LoRAs a wrong letter cost half a second and more."""
    for i in range(1000):
        (tmp_path / f"my_lora_style_{i:05}.safetensors").touch()
    (tmp_path / "harbour at night.safetensors").touch()
    compared, prepare = [], difflib.SequenceMatcher.set_seq1
    note = lambda *words: (compared.append(words), prepare(*words))  # noqa: E731
    monkeypatch.setattr(difflib.SequenceMatcher, "set_seq1", note)
    for wrong, near in (("harbor_at_night", "harbour at night"), ("my_lora_stile_00777", "_00777")):
        with pytest.raises(MissingFile, match=f"Similar here: [^,]*{near}"):
            prolora.check(tmp_path / f"{wrong}.safetensors")
    assert 0 < len(compared) < 200


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def test_json_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    """Missing, a folder, a pipe that nobody writes to, too large, a pointer of Git LFS."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_text("{}" + " " * 100)
    for name in ("missing", "", "pipe", "large"):
        with pytest.raises(UnsupportedFormat):
            read_json_object(tmp_path / name, limit=50)
    (tmp_path / "pointer").write_text(LFS)
    with pytest.raises(UnsupportedFormat, match="git lfs pull"):
        read_json_object(tmp_path / "pointer")


@pytest.mark.parametrize("code", ["EACCES", "ENAMETOOLONG", "EIO", "ENOSPC", "EROFS", "ENOTDIR"])
def test_errors_of_the_system_name_the_path_and_what_to_do(code: str) -> None:
    number = getattr(errno, code)
    error = OSError(number, os.strerror(number))
    for make, kind in ((input_error, UnsupportedFormat), (output_error, OutputError)):
        made = make("folder/x", error)
        assert isinstance(made, kind)
        assert str(made).startswith("folder/x: cannot be ")
        assert os.strerror(number) + "; " in str(made)
