"""A cache keeps to its size: what was not used for longest goes, and nothing of anybody else."""

import os
import shutil

import pytest
from mini import source_weights, target_weights, write_folder

import prolora
from prolora.bases.cache.basis_cache import BasisCache
from prolora.bases.cache.cache_folder import LIMIT_VARIABLE, measure_cache, trim_cache

HEX = 32 * "0"

pytestmark = pytest.mark.usefixtures("aged")


def fill(folder, base):
    with BasisCache(folder).flush_at_end() as cache:
        for module in base.shapes:
            cache.of(base, [module], 0.9)


@pytest.fixture
def filled(tmp_path):
    """A cache with the bases of a model that was used long ago, and of one in use."""
    bases = [
        prolora.open_base(write_folder(tmp_path / name, made()))
        for name, made in (("source", source_weights), ("target", target_weights))
    ]
    fill(tmp_path / "cache", bases[0])
    for file in list_bases(tmp_path / "cache"):
        os.utime(file, (1, 1))
    old = set(list_bases(tmp_path / "cache"))
    fill(tmp_path / "cache", bases[1])
    return tmp_path / "cache", old, set(list_bases(tmp_path / "cache")) - old


def list_bases(folder):
    return list(folder.rglob("*.safetensors"))


def test_what_was_not_used_for_longest_goes_first(filled, monkeypatch):
    folder, old, new = filled
    size = measure_cache(folder)
    assert size == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    least = max(path.stat().st_size for path in old)
    monkeypatch.setenv(LIMIT_VARIABLE, str(size - least))
    trim_cache(folder)
    left = set(list_bases(folder))
    assert new <= left and left < old | new and size - 2 * least <= measure_cache(folder)
    trim_cache(folder)
    assert set(list_bases(folder)) == left


def test_a_run_that_keeps_something_trims_the_folder(filled, tmp_path, monkeypatch):
    folder, old, new = filled
    monkeypatch.setenv(LIMIT_VARIABLE, "1")
    other = {name: weight + 1 for name, weight in source_weights().items()}
    fill(folder, prolora.open_base(write_folder(tmp_path / "other", other)))
    assert not any(path.exists() for path in old | new)


@pytest.mark.parametrize("linked", [False, True])
def test_files_of_others_and_links_stay(filled, tmp_path, monkeypatch, linked):
    folder, _, _ = filled
    names = ["mine.safetensors", "bases/notes.txt", f"bases/{HEX}.bin", f"mine/{HEX}.safetensors"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / f"{HEX}.safetensors").write_text("mine")
    if linked:
        shutil.rmtree(folder / "files")
        (folder / "files").symlink_to(outside)
        (folder / "bases" / f"{HEX}.safetensors").symlink_to(folder / "mine.safetensors")
    monkeypatch.setenv(LIMIT_VARIABLE, "1")
    trim_cache(folder)
    assert all((folder / name).read_text() == "mine" for name in names)
    assert (outside / f"{HEX}.safetensors").exists() and measure_cache(folder) == 0


def test_a_size_that_is_none_is_refused(filled, monkeypatch):
    monkeypatch.setenv(LIMIT_VARIABLE, "much")
    with pytest.raises(ValueError, match="as 2GiB"):
        trim_cache(filled[0])
