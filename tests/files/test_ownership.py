"""Which files are prolora's own: those it wrote, as long as nobody has changed them."""

import errno
import io
import json
import os
from pathlib import Path
from typing import get_args

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from property_examples import examples

from prolora.errors import ForeignFile, OutputError
from prolora.files import ownership
from prolora.files.ownership import (
    MARK_KEY,
    Kind,
    check_replaceable,
    is_own,
    make_mark,
    sign,
    sign_png,
)
from prolora.files.safetensors_file import SafetensorsFile
from prolora.files.writing import write_safetensors, write_text_atomically

UNSIGNED = make_mark("report")
TENSORS = {"up": torch.arange(12.0).reshape(4, 3), "alpha": torch.tensor(2.0)}


def write_lora(path: Path) -> Path:
    write_safetensors(path, TENSORS, {"title": "mine", MARK_KEY: make_mark("LoRA")})
    return path


def make_png() -> bytes:
    image = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    image.new("RGB", (5, 4), "red").save(buffer, "png")
    return sign_png(buffer.getvalue())


def test_a_file_that_was_written_is_known_again(tmp_path: Path) -> None:
    """Of every kind, under another name too."""
    texts = (
        f"<!-- written by {UNSIGNED} -->\n# A card with ä\n",
        json.dumps([{"written_by": UNSIGNED, "x": 1}, {"written_by": UNSIGNED}]),
    )
    for i, text in enumerate(texts):
        write_text_atomically(tmp_path / f"{i}", text)
    (tmp_path / "picture.png").write_bytes(make_png())
    write_lora(tmp_path / "lora.safetensors").rename(tmp_path / "renamed")
    for kind, names in (("report", "01"), ("picture", ["picture.png"]), ("LoRA", ["renamed"])):
        for name in names:
            check_replaceable(tmp_path / name, kind)
        for other in get_args(Kind):
            assert is_own(tmp_path / name, other) == (other == kind)
    SafetensorsFile(tmp_path / "renamed")


@settings(max_examples=examples(120), deadline=None)
@given(st.data())
def test_a_change_of_any_byte_makes_a_file_foreign(data: st.DataObject) -> None:
    text = f"<!-- {UNSIGNED} -->\nwords".encode()
    whole, kind = data.draw(st.sampled_from([(sign(text), "report"), (make_png(), "picture")]))
    place = data.draw(st.integers(0, len(whole) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda value: value != whole[place]))
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"prolora-test-{os.getpid()}"
    try:
        path.write_bytes(whole)
        assert is_own(path, kind)
        for changed in (
            whole[:place] + bytes([value]) + whole[place + 1 :],
            whole[:place],
            whole + bytes([value]),
            b"quoted: " + whole,
        ):
            path.write_bytes(changed)
            assert not is_own(path, kind)
    finally:
        path.unlink()


def test_a_change_of_the_checksum_behind_the_mark_of_a_picture_makes_it_foreign(
    tmp_path: Path,
) -> None:
    whole = make_png()
    for place in range(len(whole) - 16, len(whole) - 12):
        path = tmp_path / "picture.png"
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert not is_own(path, "picture")


def test_a_lora_that_was_trained_on_or_saved_again_is_foreign(tmp_path: Path) -> None:
    """Though its header kept the mark: other numbers at the same places, and equal numbers anew."""
    path = write_lora(tmp_path / "x.safetensors")
    header = SafetensorsFile(path).metadata
    trained = bytearray(path.read_bytes())
    trained[-1] ^= 1
    for content in (
        bytes(trained),
        safetensors.torch.save(TENSORS, header),
        safetensors.torch.save({name: t + 1 for name, t in TENSORS.items()}, header),
    ):
        path.write_bytes(content)
        assert SafetensorsFile(path).metadata == header
        with pytest.raises(
            ForeignFile, match=r"x\.safetensors: exists and is not a LoRA as prolora"
        ):
            check_replaceable(path, "LoRA")
        check_replaceable(path, "LoRA", overwrite=True)


def test_a_signed_picture_is_read_by_others() -> None:
    image = pytest.importorskip("PIL.Image")
    with image.open(io.BytesIO(make_png())) as picture:
        picture.load()
        assert picture.text["prolora"].startswith("prolora:picture:sha256:")


def test_a_text_that_quotes_marks_is_still_known_again(tmp_path: Path) -> None:
    """Before and behind its own: those of other files, and one that was never filled in."""
    quoted = sign(UNSIGNED.encode()).decode()
    text = f"{quoted} {UNSIGNED} {quoted} {UNSIGNED}"
    write_text_atomically(tmp_path / "x", text)
    assert is_own(tmp_path / "x", "report")


def test_nothing_and_empty_files_may_be_replaced(tmp_path: Path) -> None:
    check_replaceable(tmp_path / "nothing", "report")
    (tmp_path / "empty").touch()
    check_replaceable(tmp_path / "empty", "report")
    for content in (b"x", b"prolora:report:sha256:", UNSIGNED.encode()):
        (tmp_path / "foreign").write_bytes(content)
        with pytest.raises(ForeignFile):
            check_replaceable(tmp_path / "foreign", "report")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    check_replaceable(tmp_path / "pipe", "report")  # whose kind `check_writable` refuses


def test_a_file_that_cannot_be_read_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, kind: str) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(ownership, "is_own", fail)
    (tmp_path / "secret").write_text("x")
    with pytest.raises(OutputError, match="exists and cannot be read: Permission denied"):
        check_replaceable(tmp_path / "secret", "report")
