"""What comes from outside: only regular files are opened."""

import os
from pathlib import Path

import pytest

from prolora.errors import InvalidOption, UnsupportedFormat
from prolora.files.outside import open_regular, read_text
from prolora.probe.settings import read_prompts
from prolora.workflow.fleet.listing import list_loras


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
