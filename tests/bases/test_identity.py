"""Which file a base is: by its content, whatever a change to it leaves as it was."""

import hashlib
import mmap
import os

import pytest
import torch
from mini import source_weights
from safetensors.torch import save_file

from prolora.bases import identity, open_base
from prolora.bases.cache import basis_cache
from prolora.bases.cache.basis_cache import BasisCache
from prolora.bases.identity import compute_identity, compute_sha256
from prolora.errors import UnsupportedFormat

NAME = next(iter(source_weights()))


def write_base(path, value):
    path.parent.mkdir(exist_ok=True)
    save_file({f"{NAME}.weight": torch.full((64, 64), float(value))}, path)
    os.utime(path, (1_700_000_000,) * 2)
    return path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def mapped(tmp_path):
    """A file, and memory that is shared with it and was written to a moment ago."""
    path = write_base(tmp_path / "base.safetensors", 1)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[-1] = memory[-1]
        os.fsync(file.fileno())
        before = path.stat().st_mtime_ns
        memory[-1] = memory[-1]
        if path.stat().st_mtime_ns == before:
            pytest.skip("this file system does not tell of changes through shared memory")
        yield path, memory


def test_a_file_that_is_changed_through_shared_memory_is_hashed_again(mapped):
    path, memory = mapped
    first = compute_sha256(open_base(path))
    assert first == sha256(path)
    memory[-3] ^= 1
    assert compute_sha256(open_base(path)) == sha256(path) != first


def test_the_index_forgets_a_file_that_is_changed_through_shared_memory(mapped, monkeypatch):
    monkeypatch.setattr(basis_cache, "SETTLING_TIME", -(10**18))
    path, memory = mapped
    folder = path.parent / "cache"
    with BasisCache(folder).saving() as cache:
        cache.of(open_base(path), [NAME], 4)
    assert BasisCache(folder).digest(open_base(path), NAME)
    memory[-3] ^= 1
    assert BasisCache(folder).digest(open_base(path), NAME) is None


def test_a_file_of_equal_path_size_and_time_is_hashed_again(tmp_path):
    path = write_base(tmp_path / "base.safetensors", 1)
    first = compute_sha256(open_base(path))
    write_base(path, 2)
    assert compute_sha256(open_base(path)) == sha256(path) != first


@pytest.fixture
def hashed(monkeypatch):
    """The files that are hashed."""
    files, real = [], identity.hash_file

    def count(file):
        files.append(file)
        return real(file)

    monkeypatch.setattr(identity, "hash_file", count)
    return files


def keep_hash(path, folder):
    """As a new process does, which knows no hash but those of the folder."""
    identity._hash_whole.cache_clear()
    with BasisCache(folder).saving() as cache:
        return compute_sha256(open_base(path), cache)


def test_a_hash_that_a_cache_keeps_is_that_of_the_file_as_it_is_now(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(basis_cache, "SETTLING_TIME", -(10**18))
    path = write_base(tmp_path / "base.safetensors", 1)
    first = keep_hash(path, tmp_path / "cache")
    assert keep_hash(path, tmp_path / "cache") == first == sha256(path) and hashed == [path]
    write_base(path, 2)  # of equal size and time
    assert keep_hash(path, tmp_path / "cache") == sha256(path) != first
    copy = write_base(tmp_path / "copy" / "base.safetensors", 3)
    assert keep_hash(copy, tmp_path / "cache") == sha256(copy) and hashed == [path, path, copy]


def test_a_cache_keeps_no_hash_of_a_file_that_may_change_within_its_clock_tick(tmp_path, hashed):
    path = write_base(tmp_path / "base.safetensors", 1)
    for _ in range(2):
        assert keep_hash(path, tmp_path / "cache") == sha256(path)
    assert hashed == [path, path]


def test_a_base_stays_what_it_is_when_the_working_folder_changes(tmp_path, monkeypatch):
    paths = [write_base(tmp_path / name / "base.safetensors", i) for i, name in enumerate("ab")]
    monkeypatch.chdir(tmp_path / "a")
    base = open_base("base.safetensors")
    hashes = [compute_sha256(base)]
    monkeypatch.chdir(tmp_path / "b")
    assert torch.equal(base.read(NAME), torch.zeros(64, 64))
    assert compute_identity(base) == f"sha256:{hashes[0]}"
    hashes.append(compute_sha256(open_base("base.safetensors")))
    assert hashes == [sha256(path) for path in paths]


def test_a_file_that_changes_while_it_is_hashed_is_refused(tmp_path, monkeypatch):
    path = write_base(tmp_path / "base.safetensors", 1)
    base, real = open_base(path), identity.hash_file

    def slow(file):
        write_base(path, 2)
        return real(file)

    monkeypatch.setattr(identity, "hash_file", slow)
    with pytest.raises(UnsupportedFormat, match="was changed while it was in use"):
        compute_sha256(base)
