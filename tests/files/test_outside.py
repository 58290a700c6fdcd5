"""What comes from outside: only files are opened, and values are of the kinds that they claim."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prolora.errors import InvalidOption, UnsupportedFormat
from prolora.files.outside import is_path_text, open_regular, read_fields, read_text
from prolora.probe.settings import read_prompts
from prolora.workflow.fleet.listing import list_loras


@dataclass(frozen=True)
class Sample:
    name: str
    kind: Literal["a", "b"] = "a"
    size: int = 0
    share: float | None = None
    done: bool = False
    words: dict[str, str] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)


def test_pipes_devices_and_folders_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(UnsupportedFormat, match=path.name):
            open_regular(path)
    (tmp_path / "large").write_bytes(b"12345")
    with pytest.raises(UnsupportedFormat, match="too large"):
        open_regular(tmp_path / "large", 4)
    with open_regular(tmp_path / "large", 5) as file:
        assert file.read() == b"12345"


def test_fields_of_the_kinds_that_they_claim_are_read():
    content = {
        "name": "x",
        "kind": "b",
        "size": 3,
        "share": 1,
        "words": {"a": "b"},
        "rest": {"a": []},
    }
    assert read_fields(Sample, content, "here") == Sample(**content)


BAD = [{}, {"name": 1}, {"name": None}, {"name": "x", "more": 1}, {"name": "x", "kind": "c"}]
BAD += [
    {"name": "x", name: value} for name, value in (("size", True), ("size", 1.5), ("size", 2**70))
]
BAD += [{"name": "x", "share": value} for value in (float("nan"), float("inf"), True, 10**400, "1")]
BAD += [
    {"name": "x", "done": 1},
    {"name": "x", "words": {"a": 1}},
    {"name": "x", "kind": []},
    [],
    None,
]


@pytest.mark.parametrize("content", BAD, ids=lambda content: str(content)[:40])
def test_all_else_is_refused_in_one_sentence(content):
    with pytest.raises(UnsupportedFormat, match="here: is damaged"):
        read_fields(Sample, content, "here")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["name", "kind", "size", "share", "done", "words"]), VALUES))
def test_whatever_json_holds_is_read_or_refused(content):
    try:
        sample = read_fields(Sample, content, "here")
    except UnsupportedFormat:
        return
    assert isinstance(sample.name, str) and type(sample.size) is int and sample.kind in ("a", "b")


def test_a_path_has_no_null_byte_and_no_half_character():
    assert is_path_text("/a/b") and is_path_text(os.fsdecode(b"/caf\xe9"))
    assert not any(map(is_path_text, ("", "a\0b", "\ud800")))


def test_a_list_or_prompts_that_never_end_are_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path / "pipe.txt", Path("/dev/zero")):
        with pytest.raises(UnsupportedFormat, match="not a regular file"):
            read_text(path)
    (tmp_path / "words.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UnsupportedFormat):
        read_text(tmp_path / "words.txt")
    (tmp_path / "link.txt").symlink_to(tmp_path / "pipe.txt")
    with pytest.raises(UnsupportedFormat, match="not a regular file"):
        list_loras([tmp_path / "link.txt"])
    with pytest.raises(InvalidOption, match="not a regular file"):
        read_prompts(tmp_path / "pipe.txt")
