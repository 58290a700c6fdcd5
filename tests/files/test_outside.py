"""What comes from outside: only regular files are opened."""

import os
import re
from pathlib import Path

import pytest

import prolora
from prolora.errors import InvalidOption, UnsupportedFormat
from prolora.files.untrusted import open_regular, read_text
from prolora.fitting.settings import read_prompts
from prolora.fleet.listing import list_loras

# Everything that opens a path or runs a reader of its own, outside `files/`: a line's place -> what
# it reads.
OPENS = re.compile(
    r"from_pretrained|torch\.load|np\.load|pickle\.|Image\.open|safe_open|\bload_file\b|json\.load\("
    r"|read_bytes|\.read_text\(|os\.open|fdopen|mmap|(?<![\w.])(?<!def )open\(|\.load_state_dict"
    r"|from_single_file"
)
ALLOWED = {
    "architectures/layouts.py": "a table of the package",
    "architectures/loaders.py": "a table of the package",
    "reports/page/render.py": "a table of the package",
    "cli/commands.py": "docstrings of the package",
    "bases/memory.py": "the system's word on this process",
    "fitting/picture_files.py": "a picture that `open_regular` opened",
}


def test_every_byte_comes_in_through_one_room():
    """No library opens a user's path but by `load_pretrained`; nothing unpickles."""
    package = Path(prolora.__file__).parent
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if path.parent.name != "files"
        for line in path.read_text("utf-8").splitlines()
        if OPENS.search(line.partition("#")[0]) and not line.lstrip().startswith(('"', "'"))
    }
    assert found == ALLOWED.keys()


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
    (tmp_path / "line.txt").write_text("x" * 100_000)
    with pytest.raises(
        UnsupportedFormat, match=r"line\.txt: a line of 100,000 characters is not a path"
    ):
        list_loras([tmp_path / "line.txt"])
    with pytest.raises(InvalidOption, match="not a regular file"):
        read_prompts(tmp_path / "pipe.txt")
