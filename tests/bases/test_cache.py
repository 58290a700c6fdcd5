"""The basis cache: the same bases, sooner; and never a wrong one."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from fresh import forks, start_fork
from lora_files import same_bits
from mini import source_weights, write_case, write_folder
from safetensors.torch import save_file
from spectra import weights

import prolora
from prolora.bases import leaves
from prolora.bases.cache import basis_cache as cache_module
from prolora.bases.cache import basis_file
from prolora.bases.cache.basis_cache import BasisCache, default_folder
from prolora.bases.cache.tables import JsonTable
from prolora.comparison.block_matching import match_blocks
from prolora.files.hashing import hash_text

pytestmark = pytest.mark.usefixtures("aged")
FIELDS = ("U", "S", "V", "rank", "energy", "residual", "gap", "bound", "ok")


@pytest.fixture
def stack():
    return torch.stack([weights(30, 40, seed) for seed in range(4)]).half()


def write_stack(folder, stack):
    """A base of a stack of weights, in a file that is written once."""
    digest = hash_text(f"{stack.dtype} {tuple(stack.shape)} {stack.double().norm()}")[:16]
    file = folder / "models" / f"{digest}.safetensors"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        keys = [f"blocks.{i}.attn.to_q.weight" for i in range(len(stack))]
        save_file({key: w.contiguous() for key, w in zip(keys, stack, strict=True)}, file)
    return file


def compute(folder, stack, rank=5):
    """The bases of a stack."""
    return compute_of(folder, prolora.open_base(write_stack(folder, stack)), rank)


def compute_of(folder, base, rank=5, modules=()):
    with BasisCache(folder).flush_at_end() as cache:
        return cache.of(base, list(modules or base.shapes), rank)


def same(found, wanted):
    for name in FIELDS:
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    assert found.solvers == wanted.solvers


def no_svd(monkeypatch):
    for name in ("truncated_svd", "find_projectors"):
        monkeypatch.setattr(cache_module, name, lambda *a, **k: pytest.fail("an SVD ran"))


def files_of(folder):
    return sorted((folder / "bases").glob("*.safetensors"))


@pytest.mark.parametrize("rank", [5, 0.8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_cache_changes_no_bit_of_a_basis(stack, tmp_path, monkeypatch, rank, dtype):
    plain = prolora.truncated_svd(stack.to(dtype), rank)
    same(compute(tmp_path, stack.to(dtype), rank), plain)
    no_svd(monkeypatch)
    same(compute(tmp_path, stack.to(dtype), rank), plain)


def flip(content, place):
    content[place] ^= 1
    return content


def swap(content, size):
    """Swaps numbers, words, or sectors within a page or beyond it."""
    start = len(content) - 16384
    one, two = (slice(at, at + size) for at in (start, start + size))
    content[one], content[two] = content[two], content[one]
    return content


DAMAGE = {
    "flipped bit": lambda content: flip(content, len(content) - 20),
    # The first digit of a number, so that the header still reads as one.
    "header": lambda content: flip(content, content.index(BOUND) + len(BOUND)),
    "cut off": lambda content: content[:-5],
    "garbage": lambda content: b"not a basis",
    "empty": lambda content: b"",
    **{f"{size} bytes": partial(swap, size=size) for size in (2, 4, 512, 2048)},
}
BOUND = b'\\"bound\\": '


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_recomputed_and_mended(stack, tmp_path, monkeypatch, how, caplog):
    large = stack.repeat(1, 6, 6)
    wanted = compute(tmp_path, large, 50)
    for path in files_of(tmp_path):
        damaged = DAMAGE[how](bytearray(path.read_bytes()))
        assert damaged != path.read_bytes()
        path.write_bytes(damaged)
    same(compute(tmp_path, large, 50), wanted)
    assert caplog.text.count("made again") == 4
    no_svd(monkeypatch)
    same(compute(tmp_path, large, 50), wanted)


@pytest.mark.parametrize("name", ["U", "V", "S", ""])
def test_a_file_whose_tensors_do_not_fit_together_or_the_weight_is_made_again(
    stack, tmp_path, name, caplog
):
    """Whole and with right checksums, but not written by us."""
    wanted = compute(tmp_path, stack[:1])
    (path,) = files_of(tmp_path)
    basis, _ = basis_file.read_basis(path)
    other = prolora.truncated_svd(weights(30, 30, 9)[None], 5)[0]
    if name:
        other = replace(basis, **{name: getattr(basis, name)[..., :3]})
    basis_file.write_basis(path, other, path.stem)
    same(compute(tmp_path, stack[:1]), wanted)
    assert "made again" in caplog.text and (not name or "do not fit together" in caplog.text)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(prolora.errors.OutputError, match="cache folder"):
        prolora.transfer(*write_case(tmp_path), cache=tmp_path / "file" / "cache")


@pytest.fixture
def many():
    return torch.stack([weights(60, 60, seed) for seed in range(12)])


@forks
def test_processes_that_fill_one_folder_at_once_agree(tmp_path, many, monkeypatch):
    wanted = compute(tmp_path / "alone", many)
    write_stack(tmp_path, many)  # or one process could read what the other has half written
    running = [start_fork(lambda: same(compute(tmp_path, many), wanted)) for _ in range(2)]
    assert [os.waitpid(process, 0)[1] for process in running] == [0, 0]
    no_svd(monkeypatch)
    same(compute(tmp_path, many), wanted)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.skipif(hasattr(os, "fork"), reason="for systems without forks; asked above")
def test_commands_that_fill_one_folder_at_once_agree(tmp_path):
    """On Windows, where a file that another process has open is not replaced."""
    lora, source, target = write_case(tmp_path)
    outs = [tmp_path / f"{number}.safetensors" for number in range(2)]
    bases = "--source", source, "--target", target, "--cache", tmp_path / "cache"
    line = [sys.executable, "-m", "prolora", "transfer", lora, *bases, "--method", "prolora", "-o"]
    running = [subprocess.Popen([*line, out], stderr=subprocess.PIPE, text=True) for out in outs]
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert same_bits(*outs) and not [text for text in errors if "not kept" in text]
    assert files_of(tmp_path / "cache") and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no write permission to take away")
def test_a_folder_that_cannot_be_written_is_only_read(stack, tmp_path, caplog):
    wanted = compute(tmp_path / "a", stack, 5)
    blocked = tmp_path / "b"
    blocked.mkdir()
    (blocked / "bases").write_text("in the way, also of root")
    same(compute(blocked, stack, 5), wanted)
    assert caplog.text.count("bases are not kept") == 1


def test_a_basis_of_a_file_that_was_written_to_since_is_not_found(tmp_path):
    folder = write_folder(tmp_path / "base", source_weights())
    file, name = next(folder.glob("*.safetensors")), next(iter(source_weights()))
    compute_of(tmp_path / "cache", prolora.open_base(folder), modules=[name])
    status, content = file.stat(), file.read_bytes()
    # The same size, and the same time of the last change.
    file.write_bytes(content.replace(source_weights()[name].numpy().tobytes()[:64], b"\0" * 64))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    base = prolora.open_base(folder)
    computed = compute_of(tmp_path / "cache", base, modules=[name])
    same(computed, compute(tmp_path / "new", base.read(name)[None]))


def test_a_basis_is_found_again_by_the_weight_in_whatever_file_it_is(tmp_path, monkeypatch):
    """Another machine, folder, name, shard or repackaged file: what serves one serves all."""
    tensors = source_weights()
    base = prolora.open_base(write_folder(tmp_path / "base", tensors))
    name = next(iter(base.shapes))
    first = compute_of(tmp_path / "cache", base, modules=[name])
    save_file({f"{name}.weight": tensors[name]}, tmp_path / "other.safetensors")
    no_svd(monkeypatch)
    same(compute_of(tmp_path / "cache", prolora.open_base(tmp_path / "other.safetensors")), first)


def test_a_transfer_with_a_warm_cache_writes_the_same_lora_and_reads_no_weight(
    tmp_path, monkeypatch
):
    case, cache = write_case(tmp_path), tmp_path / "cache"
    plain = prolora.transfer(*case, method="prolora").state_dict()
    cold = prolora.transfer(*case, cache=cache, method="prolora").state_dict()
    no_svd(monkeypatch)
    monkeypatch.setattr(prolora.Base, "read", lambda *a: pytest.fail("a weight was read"))
    warm = prolora.transfer(*case, cache=cache, method="prolora").state_dict()
    for tensors in (cold, warm):
        assert tensors.keys() == plain.keys()
        assert all(torch.equal(tensors[key], plain[key]) for key in plain)


def test_what_a_cache_does_not_hold_is_not_looked_for_among_what_it_does(tmp_path, monkeypatch):
    """A comparison with a thousand other names took 0.2 s for each of a thousand weights."""
    monkeypatch.setattr("difflib.get_close_matches", lambda *a: pytest.fail("names were compared"))
    prolora.transfer(*write_case(tmp_path), cache=tmp_path / "cache", method="prolora")
    assert len([*(tmp_path / "cache" / "bases").iterdir()]) == 16


def test_without_a_cache_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PROLORA_CACHE", str(tmp_path / "default"))
    lora, source, target = write_case(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    prolora.transfer(lora, source, target, out=tmp_path / "out.safetensors", method="prolora")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "out.safetensors"])


def test_the_default_folder_is_the_platform_s_unless_the_environment_names_one(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("PROLORA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "prolora"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative, so it counts as not set")
    assert default_folder() == Path.home() / ".cache" / "prolora"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert default_folder() == Path.home() / "Library" / "Caches" / "prolora"
    monkeypatch.setenv("PROLORA_CACHE", "/mine")
    assert default_folder() == Path("/mine")


def test_matching_with_a_warm_cache_reads_no_weight(tmp_path, monkeypatch):
    _, source, target = write_case(tmp_path)
    bases = [prolora.open_base(path) for path in (source, target)]
    plain = match_blocks(*bases)
    cold = match_blocks(*bases, cache=tmp_path / "cache")
    monkeypatch.setattr(prolora.Base, "read", lambda *a: pytest.fail("a weight was read"))
    warm = match_blocks(*map(prolora.open_base, (source, target)), cache=tmp_path / "cache")
    assert warm == cold and warm.table == plain.table


def test_a_link_in_the_cache_leads_no_writing_to_a_file_of_others(tmp_path, stack):
    victim = tmp_path / "victim"
    victim.write_text("a week of training")
    wanted = compute(tmp_path, stack[:1])
    (kept,) = files_of(tmp_path)
    kept.unlink()
    kept.symlink_to(victim)
    same(compute(tmp_path, stack[:1]), wanted)
    assert not kept.is_symlink()
    (tmp_path / "table").symlink_to(victim)
    table = JsonTable(tmp_path / "table")
    table.put("key", 1)
    table.save()
    assert JsonTable(tmp_path / "table").get("key") == 1
    base = tmp_path / "base"
    base.write_text("weights")
    digest = leaves.digest_file(base, tmp_path / "notes")
    for note in (tmp_path / "notes").rglob("*.json"):
        leaves._known.clear()
        note.unlink()
        note.symlink_to(victim)
    assert leaves.digest_file(base, tmp_path / "notes") == digest
    assert victim.read_text() == "a week of training"


def test_bases_in_memory_never_share_a_name_though_the_first_are_gone():
    """Their names are places in memory, which others would get."""
    cache = BasisCache(None)
    places = {cache.place(prolora.open_base({"a.weight": torch.eye(2)}), "a") for _ in range(30)}
    assert len(places) == 30


def test_a_table_that_is_a_pipe_or_a_device_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("pipe", "endless", "missing"):
        assert JsonTable(tmp_path / name).get("key") is None


@forks
def test_a_full_disk_costs_only_time_and_is_said_once(tmp_path, many, caplog):
    wanted, model = compute(tmp_path / "x", many), prolora.open_base(write_stack(tmp_path, many))

    def fill():
        """The kernel refuses to write beyond 1 kB, in the middle of a file."""
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        same(compute_of(tmp_path / "full", model), wanted)
        assert caplog.text.count("bases are not kept") == 1

    assert os.waitpid(start_fork(fill), 0)[1] == 0
    assert not [path for path in (tmp_path / "full").rglob("*") if path.is_file()]
