"""Looking after the cache: what is in it, whether it is sound, and what can go."""

import json
import os
import shutil
import sys
import time

import pytest
import torch
from mini import source_weights, target_weights, write_case, write_folder
from safetensors.torch import save_file
from spectra import weights
from typer.testing import CliRunner

import prolora
from prolora.bases.cache import basis_file, cache_folder, maintenance
from prolora.bases.cache.basis_cache import BasisCache
from prolora.bases.cache.basis_names import basis_name, hash_weight
from prolora.cli import app
from prolora.cli.basis import parse_age
from prolora.comparison.comparison import compare as compare_bases


@pytest.fixture
def filled(tmp_path):
    """A cache with the bases of two models, and the models."""
    bases = [
        prolora.open_base(write_folder(tmp_path / name, made()))
        for name, made in (("source", source_weights), ("target", target_weights))
    ]
    with BasisCache(tmp_path / "cache").saving() as cache:
        for base in bases:
            for module in base.shapes:
                cache.of(base, [module], 0.9)
    return tmp_path / "cache", *bases


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_list_says_whose_bases_there_are_and_how_large(filled, caplog):
    folder, _, target = filled
    found = maintenance.take_inventory(folder)
    assert [(s.base, s.rule, s.count, s.dtypes) for s in found.shelves] == [
        ("source", "0.9", 12, "int16"),
        ("target", "0.9", 8, "int16"),
    ]
    assert found.size == size_of(folder) and found.temporary == found.foreign == (0, 0)
    assert found.shelves[1].columns_max == max(
        int(prolora.truncated_svd(target.read(name), 0.9).rank) for name in target.shapes
    )
    assert maintenance.take_inventory(folder / "nothing").size == 0 and not caplog.records


def test_a_list_names_the_bases_that_a_comparison_has_computed(tmp_path):
    _, source, target = write_case(tmp_path)
    compare_bases(source, target, rank=0.9, cache=tmp_path / "cache")
    found = maintenance.take_inventory(tmp_path / "cache")
    assert [(s.base, s.rule, s.count) for s in found.shelves] == [
        ("source", "0.9", 8),
        ("target", "0.9", 8),
    ]


def test_a_verification_finds_what_was_flipped(filled):
    folder, source, _ = filled
    assert maintenance.verify_cache(folder, source, 0.9).to_dict() == {
        "checked": 20,
        "damaged": {},
        "recomputed": 12,
        "wrong": {},
        "absent": 0,
        "ok": True,
    }
    path = sorted(folder.rglob("*.safetensors"))[3]
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)
    found = maintenance.verify_cache(folder)
    assert list(found.damaged) == [str(path)] and not found.ok


def test_a_verification_against_the_weights_finds_a_basis_that_is_not_theirs(filled):
    """A whole file with right checksums, but computed from something else."""
    folder, source, _ = filled
    module = next(iter(source.shapes))
    cache = BasisCache(folder)
    name = basis_name(hash_weight(source.read(module)), 0.9)
    other = prolora.truncated_svd(weights(*source.shapes[module], seed=99)[None], 0.9)[0]
    basis_file.write_basis(
        cache.path(name), basis_file.make_stored_basis(other, 1e-3, {"name": name})
    )
    found = maintenance.verify_cache(folder, source, 0.9)
    assert list(found.wrong) == [module] and "residual" in found.wrong[module]


def test_a_verification_finds_columns_that_are_not_orthonormal(filled):
    """W V = U Σ holds for them all the same."""
    folder, source, _ = filled
    names = {basis_name(hash_weight(source.read(module)), 0.9): module for module in source.shapes}
    path = next(path for path in folder.rglob("*.safetensors") if path.stem in names)
    stored = basis_file.read_basis(path)
    scales = {f"{name}.scale": 1.1 * stored.tensors[f"{name}.scale"] for name in "UV"}
    basis_file.write_basis(
        path, basis_file.StoredBasis(dict(stored.tensors) | scales, stored.facts)
    )
    found = maintenance.verify_cache(folder, source, 0.9)
    assert list(found.wrong) == [names[path.stem]] and not found.ok and not found.damaged
    assert "not orthonormal" in found.wrong[names[path.stem]]


def test_pruning_removes_leftovers_and_nothing_that_is_of_use(filled):
    folder, *_ = filled
    whole = size_of(folder)
    version = next(folder.glob("v*"))
    stale, fresh = (
        version / "ab" / f".prolora-{'1' * 16}.tmp",
        version / f".prolora-{'2' * 16}.tmp",
    )
    old = folder / "cd" / f"cd{'0' * 62}.safetensors"
    mine = [folder / "notes-of-mine.txt", folder / "cd" / f"cd{'1' * 62}.safetensors"]
    for path in (stale, fresh, old, *mine):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 10)
    basis = next(version.rglob("*.safetensors")).read_bytes()
    old.write_bytes(basis)
    os.utime(stale, (time.time() - 10_000,) * 2)
    assert maintenance.take_inventory(folder).temporary == (2, 20)
    wanted = (2, 10 + len(basis))
    said = maintenance.prune_cache(folder, dry_run=True)
    assert (said.files, said.size) == wanted and stale.exists()
    said = maintenance.prune_cache(folder)
    assert (said.files, said.size) == wanted
    assert fresh.exists() and all(path.exists() for path in mine)
    assert not stale.exists() and not old.exists()
    assert size_of(folder) == whole + 30


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pruning_leaves_files_of_others_in_a_folder_that_is_called_like_ours(tmp_path):
    for name in ("v1/settings.json", "v1/xl/a.safetensors", "v2/aa/b.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    # Stores that name files by their content have such names as well.
    stored = tmp_path / "aa" / f"aa{'0' * 62}.safetensors"
    stored.parent.mkdir()
    save_file({"x": torch.zeros(2)}, stored)
    (tmp_path / "v2" / f"index-{'0' * 32}.json").write_text("{}")
    (tmp_path / "v2" / f".prolora-{'0' * 16}.tmp").write_text("somebody's result")
    before = snapshot(tmp_path)
    for everything in (False, True):
        said = maintenance.prune_cache(tmp_path, everything=everything, older_than=0, max_size=0)
        assert (said.files, said.size, said.left) == (0, 0, 0)
    assert snapshot(tmp_path) == before
    # Nor does a cache that is made beside them take them over.
    cache = BasisCache(tmp_path)
    cache.bases(weights(8, 8, 0)[None], 2)
    maintenance.prune_cache(tmp_path, everything=True)
    assert snapshot(tmp_path) == before


def test_pruning_leaves_other_names_in_a_cache_of_ours(filled):
    """Each is almost one of ours; the folder is marked, so that no content is looked at."""
    folder, *_ = filled
    version = next(folder.glob("v*"))
    shelf = next(version.rglob("*.safetensors")).parent
    other = "00" if shelf.name != "00" else "11"
    names = [
        shelf / "mine.safetensors",
        shelf / f"{other}{'0' * 62}.safetensors",  # of another shelf
        shelf / f"{shelf.name}{'0' * 61}.safetensors",
        shelf / f"{shelf.name}{'0' * 62}.safetensors.bak",
        shelf / f"{shelf.name}{'A' * 62}.safetensors",
        shelf / ".prolora-notes.tmp",
        version / "xl" / f"xl{'0' * 62}.safetensors",
        version / "abc" / f"abc{'0' * 61}.safetensors",
        version / "settings.json",
        version / "index-mine.json",
        version / f"pictures-{'0' * 32}.json",
        version / ".prolora-notes.tmp",
        folder / "v0" / "settings.json",
        folder / "v3x" / f"index-{'0' * 32}.json",
    ]
    for path in names:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
        os.utime(path, (1, 1))
    maintenance.prune_cache(folder, older_than=0, max_size=0)
    assert snapshot(folder).items() >= {path: b"mine" for path in names}.items()
    maintenance.prune_cache(folder, everything=True)
    assert snapshot(folder) == {path: b"mine" for path in names}


def test_a_folder_that_holds_files_of_others_gets_no_marker(tmp_path):
    version = tmp_path / f"v{cache_folder.VERSION}"
    names = [
        version / "notes.txt",
        version / f".prolora-{'0' * 16}.tmp",
        version / "ab" / f".prolora-{'0' * 16}.tmp",
        version / "ab" / f"ab{'0' * 62}.safetensors",
        version / f"index-{'0' * 32}.json",
    ]
    for path in names:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
        os.utime(path, (1, 1))
    BasisCache(tmp_path).bases(weights(8, 8, 0)[None], 2)
    assert len(snapshot(tmp_path)) == len(names) + 1
    maintenance.prune_cache(tmp_path, older_than=0, everything=True)
    assert snapshot(tmp_path) == {path: b"mine" for path in names}


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_marker_of_others_marks_no_cache_of_ours(tmp_path, kind):
    """Other programs tag their caches by a file of that name; a link may lead to one of ours."""
    version = tmp_path / "v1"
    mine = version / "ab" / f"ab{'0' * 62}.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    text = cache_folder.MARKER.text
    if kind == "link":
        (tmp_path / "tag").write_bytes(text)
        (version / cache_folder.MARKER.name).symlink_to(tmp_path / "tag")
    else:
        (version / cache_folder.MARKER.name).write_bytes(
            text.partition(b"\n")[0] + b"\n# of another"
        )
    maintenance.prune_cache(tmp_path, everything=True)
    assert mine.exists() and (version / cache_folder.MARKER.name).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege")
def test_pruning_follows_no_link(filled, tmp_path):
    folder, *_ = filled
    home = tmp_path / "home"
    for name in (f"aa{'0' * 62}.safetensors", f".prolora-{'0' * 16}.tmp", "mine.safetensors"):
        home.mkdir(exist_ok=True)
        (home / name).write_bytes(b"mine")
        os.utime(home / name, (1, 1))
    shutil.copy(next(folder.rglob("*.safetensors")), home / f"aa{'1' * 62}.safetensors")
    version = next(folder.glob("v*"))
    shutil.rmtree(version / "aa", ignore_errors=True)
    (version / "aa").symlink_to("../../home")
    (folder / "v9").symlink_to(version)
    (folder / "aa").symlink_to(home)
    before = snapshot(home)
    maintenance.prune_cache(folder, older_than=0, everything=True)
    assert snapshot(home) == before and (version / "aa").is_symlink()
    assert not list(version.rglob("*.safetensors"))


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege")
def test_a_link_with_the_name_of_a_basis_is_no_file_of_the_cache(filled, tmp_path):
    folder, *_ = filled
    basis = next(folder.rglob("*.safetensors"))
    size = maintenance.measure_cache(folder)
    link = basis.with_name(f"{basis.name[:2]}{'0' * 62}.safetensors")
    link.symlink_to(tmp_path / "lora.safetensors")
    (tmp_path / "lora.safetensors").write_bytes(b"mine")
    assert maintenance.measure_cache(folder) == size
    maintenance.prune_cache(folder, everything=True)
    assert link.is_symlink() and not basis.exists()
    assert (tmp_path / "lora.safetensors").read_bytes() == b"mine"


def test_a_cache_without_a_marker_is_pruned_by_what_its_files_hold(filled):
    """One that was made before there were markers."""
    folder, *_ = filled
    version = next(folder.glob("v*"))
    (version / cache_folder.MARKER.name).unlink()
    mine = version / "ab" / f"ab{'0' * 62}.safetensors"
    mine.parent.mkdir(exist_ok=True)
    mine.write_bytes(b"mine")
    assert sum(shelf.count for shelf in maintenance.take_inventory(folder).shelves) == 20
    maintenance.prune_cache(folder, everything=True)
    assert snapshot(folder) == {mine: b"mine"}


def test_the_marker_says_whose_folder_it_is_and_goes_last(filled):
    folder, *_ = filled
    marker = next(folder.glob("v*")) / "CACHEDIR.TAG"
    assert marker.read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55\n")
    last = next(folder.rglob("*.safetensors"))
    os.utime(last, (time.time() + 60,) * 2)
    maintenance.prune_cache(folder, older_than=0)
    assert set(snapshot(folder)) == {marker, last}
    maintenance.prune_cache(folder, everything=True)
    assert folder.is_dir() and not list(folder.iterdir())


def test_a_file_that_another_process_removes_meanwhile_is_no_error(filled, monkeypatch):
    folder, source, _ = filled
    files = sorted(folder.rglob("*.safetensors"))
    listed, scan = maintenance.list_entries, cache_folder._scan_folder

    def removed(paths, entries):
        for victim in paths:
            victim.unlink(missing_ok=True)
        return entries

    def scan_and_remove(path):
        return removed([files[0]] if path == files[0].parent else [], list(scan(path)))

    # After its name was read, and before its size was.
    with monkeypatch.context() as patch:
        patch.setattr(cache_folder, "_scan_folder", scan_and_remove)
        assert maintenance.measure_cache(folder) == size_of(folder)
        assert not files[0].exists()
        files[0].touch()
        assert sum(shelf.count for shelf in maintenance.take_inventory(folder).shelves) == 19
    # After its size was read, and before its header was.
    saved = files[3].read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(
            maintenance, "list_entries", lambda path: removed([files[3]], list(listed(path)))
        )
        found = maintenance.take_inventory(folder)
        assert sum(shelf.count for shelf in found.shelves) == 18 and found.foreign == (0, 0)
        files[3].write_bytes(saved)
        assert maintenance.prune_cache(folder).files == 0
    files[3].write_bytes(saved)
    monkeypatch.setattr(
        maintenance, "list_entries", lambda path: removed(files[1:3], list(listed(path)))
    )
    found = maintenance.verify_cache(folder, source, 0.9)
    assert found.ok and found.checked == 17 and not found.damaged
    for path in files[1:3]:
        path.touch()
    assert maintenance.prune_cache(folder, older_than=-60).left == size_of(folder)


def test_pruning_takes_what_was_not_used_for_longest(filled):
    folder, source, _ = filled
    files = sorted(folder.rglob("*.safetensors"))
    for age, path in enumerate(files):
        os.utime(path, (time.time() - 86_400 * 2 * age,) * 2)
    said = maintenance.prune_cache(folder, older_than=86_400 * 29)
    assert said.files == 5 and not files[15].exists() and files[14].exists()
    limit = sum(path.stat().st_size for path in files[:4])
    maintenance.prune_cache(folder, max_size=limit)
    assert [path for path in files if path.exists()] == files[:4]
    module = list(source.shapes)
    cache = BasisCache(folder)
    for name in module:
        cache.of(source, [name], 0.9)  # is computed again, where it is gone
    assert cache.hits + cache.misses == 12 and cache.misses >= 8
    maintenance.prune_cache(folder, everything=True)
    assert not list(folder.rglob("*"))


def test_ages_are_read_as_people_write_them():
    assert [parse_age(text) for text in ("12h", "30d", "2w")] == [43_200, 2_592_000, 1_209_600]
    with pytest.raises(ValueError, match="30d"):
        parse_age("a month")


def test_the_command_line_builds_lists_verifies_and_prunes(filled, tmp_path):
    def run(*words):
        found = CliRunner().invoke(app, ["basis", *map(str, words)])
        return found.exit_code, found.stdout, found.exception

    other = tmp_path / "other"
    code, text, _ = run(tmp_path / "source", "--rank", 4, "--cache", other, "--json")
    rows = json.loads(text)
    assert code == 0 and sum(row["count"] for row in rows) == 12
    code, text, _ = run("build", tmp_path / "source", "--rank", "4", "--cache", other)
    assert code == 0 and "in " in text and str(other) in text.replace("\n", "")
    code, text, _ = run("list", "--cache", other, "--json")
    assert code == 0 and json.loads(text)["shelves"][0]["count"] == 12
    code, text, _ = run("list", "--cache", other)
    assert code == 0 and "source" in text and "KiB in the cache" in text
    code, text, _ = run("verify", tmp_path / "source", "--rank", 4, "--cache", other)
    assert code == 0 and "12 bases are what was written" in text
    path = next(other.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-4])
    code, text, error = run("verify", "--cache", other)
    assert code == 1 and "1 are damaged" in text and isinstance(error, prolora.ProLoRAError)
    assert run("prune", "--cache", other, "--json")[0] == 0
    code, text, _ = run("prune", "--all", "--cache", other)
    assert code == 0 and "0 B left" in text
    code, text, _ = run(tmp_path / "source", "--cache=none", "--rank", 4, "--json")
    assert code == 0 and not list(other.rglob("*"))
