"""Maps and reports that come from outside: read by kind and within bounds, or refused by name."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mini import shapes
from property_examples import examples

from prolora.comparison.module_map import read_map
from prolora.errors import ProLoRAError
from prolora.files.store import put_text

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FUZZ = settings(
    max_examples=examples(150), suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(content=st.binary(max_size=80) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_a_map_is_read_as_names_or_refused_by_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "map.json"
    path.write_bytes(content)
    try:
        table = read_map(path)
    except ProLoRAError as error:
        assert "map.json" in str(error) and len(str(error)) < 1000
    else:
        assert all(type(text) is str for pair in table.items() for text in pair)


@FUZZ
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.booleans())
def test_a_map_that_was_cut_off_is_refused(
    tmp_path: Path, place: int, byte: int, cut: bool
) -> None:
    """It is never a smaller map."""
    path = tmp_path / "map.json"
    path.unlink(missing_ok=True)
    names = {name: name for name in shapes(2)}
    put_text(path, json.dumps(names))
    whole = path.read_bytes()
    place %= len(whole)
    path.write_bytes(whole[:place] if cut else whole[:place] + bytes([byte]) + whole[place + 1 :])
    try:
        table = read_map(path)
    except ProLoRAError:
        return
    assert not cut or table == names


@pytest.mark.parametrize(
    "content, said",
    [
        ('{"a": {"b": "c"}}', "'a' leads to"),
        ('{"a": "' + "b" * 5000 + '"}', "'a' leads to"),
        ('{"' + "a" * 5000 + '": "b"}', "leads to 'b'"),
        ("[" * 100_000, "not JSON"),
        ('{"a": "' + "b" * (17 << 20) + '"}', "too large"),
    ],
    ids=["nested", "long name", "long target", "deep", "huge"],
)
def test_a_map_made_to_harm_is_refused_in_a_sentence(tmp_path: Path, content: str, said: str):
    path = tmp_path / "map.json"
    path.write_text(content)
    with pytest.raises(ProLoRAError, match=said) as caught:
        read_map(path)
    assert len(str(caught.value)) < 1000


def test_a_map_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "map.json")
    with pytest.raises(ProLoRAError, match="is neither"):
        read_map(tmp_path / "map.json")
