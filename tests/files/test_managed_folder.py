"""Folders with a marker: nothing of a stranger is replaced, and no link is followed."""

import os

import pytest

from prolora.errors import OutputError
from prolora.files.managed_folder import FolderMarker, ManagedFolder, is_component

MARKER = FolderMarker("OURS.TAG", b"made by a test\n")


def make(path):
    return ManagedFolder.make(path, MARKER, ["plans", "summary.json"])


def test_a_folder_is_marked_when_it_is_made_and_then_taken_again(tmp_path):
    folder = make(tmp_path / "a" / "b")
    folder.write_text("summary.json", "1")
    folder.write_text("summary.json", "2")
    assert MARKER.is_in(folder.path) and (folder.path / "summary.json").read_text() == "2"
    assert make(tmp_path / "a" / "b") == folder


@pytest.mark.parametrize("name", ["plans", "summary.json", "OURS.TAG"])
def test_a_folder_with_a_name_of_ours_and_no_marker_is_refused(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=name):
        make(tmp_path)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "mine"


def test_other_files_of_a_folder_are_nobodys_business(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert make(tmp_path) and (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["link", "other text"])
def test_a_marker_of_others_is_none(tmp_path, kind):
    (tmp_path / "plans").mkdir()
    if kind == "link":
        (tmp_path / "tag").write_bytes(MARKER.text)
        (tmp_path / "OURS.TAG").symlink_to(tmp_path / "tag")
    else:
        (tmp_path / "OURS.TAG").write_bytes(b"made by another\n")
    with pytest.raises(OutputError, match="did not write"):
        make(tmp_path)


def test_links_below_are_refused_and_one_above_is_not(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    folder = make(tmp_path / "link")
    (folder.path / "plans").symlink_to(tmp_path)
    for names in (("plans",), ("plans", "x")):
        with pytest.raises(OutputError, match="is a link"):
            folder.find_place(*names)
    with pytest.raises(OutputError, match="is a link"):
        folder.make_folder("plans", "x")


def test_an_unmarked_folder_gets_new_files_and_none_is_replaced(tmp_path):
    folder = ManagedFolder(tmp_path, MARKER)
    folder.write_text("summary.json", "1")
    with pytest.raises(OutputError, match="did not write"):
        folder.write_text("summary.json", "2")


def test_a_component_names_one_thing_on_every_system():
    assert all(map(is_component, ("a", "ssd-1b", "Größe", "a.b", "x y")))
    bad = ("", ".", "..", "a/b", "a\\b", "/a", "c:", "a\0", "a\nb", "\ud800", "x" * 300)
    assert not any(map(is_component, bad))
