"""Maps and reports that come from outside: read by kind and within bounds, or refused by name."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mini import shapes, write_case
from property_examples import examples

import prolora
from prolora.comparison.module_map import read_map
from prolora.errors import ForeignFile, ProLoRAError
from prolora.files.ownership import check_replaceable, mark_json
from prolora.files.writing import write_text_atomically
from prolora.workflow.output_paths import check_beside

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
def test_a_changed_map_is_foreign_and_a_cut_one_is_refused(
    tmp_path: Path, place: int, byte: int, cut: bool
) -> None:
    """A map that was cut off is never a smaller map, and one that was changed is not replaced."""
    path = tmp_path / "map.json"
    path.unlink(missing_ok=True)
    names = {name: name for name in shapes(2)}
    write_text_atomically(path, mark_json("map", names))
    whole = path.read_bytes()
    place %= len(whole)
    path.write_bytes(whole[:place] if cut else whole[:place] + bytes([byte]) + whole[place + 1 :])
    try:
        table = read_map(path)
    except ProLoRAError:
        return
    assert not cut or table == names
    if path.read_bytes() != whole:
        with pytest.raises(ForeignFile):
            check_replaceable(path, "map")


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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A report of a real transfer, as JSON and as a page."""
    folder = tmp_path_factory.mktemp("saved")
    report = prolora.transfer_file(*write_case(folder), folder / "o.safetensors", method="copy")
    for name in ("report.json", "report.html"):
        report.save(folder / name)
    return {name: (folder / name).read_bytes() for name in ("report.json", "report.html")}


@FUZZ
@given(data=st.data())
def test_a_report_that_was_changed_anywhere_is_not_replaced(saved, tmp_path, data) -> None:
    name = data.draw(st.sampled_from(sorted(saved)))
    whole = saved[name]
    place = data.draw(st.integers(0, len(whole) - 1))
    inserted = data.draw(st.binary(max_size=4))
    stop = data.draw(st.integers(place, min(len(whole), place + 40)))
    changed = whole[:place] + inserted + whole[stop:]
    path = tmp_path / name
    path.write_bytes(changed)
    if changed == whole:
        return check_beside(path, "report")
    with pytest.raises(ForeignFile, match=name):
        check_beside(path, "report")


@FUZZ
@given(content=st.binary(min_size=1, max_size=200))
def test_no_foreign_bytes_are_taken_for_a_report(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(ForeignFile, match=r"report\.json"):
        check_beside(path, "report")
