"""The basis cache: the same bases, sooner; and never a wrong one."""

import os
import subprocess
import sys

import pytest
import torch
from mini import write_case
from spectra import weights

import prolora
from prolora.bases import cache as cache_module
from prolora.bases.cache import BasisCache


@pytest.fixture
def stack():
    return torch.stack([weights(30, 40, seed) for seed in range(4)]).half()


def same(found, wanted):
    for name in ("U", "S", "V", "rank", "energy", "residual", "gap", "bound", "ok"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    assert found.rungs == wanted.rungs


def no_svd(monkeypatch):
    monkeypatch.setattr(cache_module, "truncated_svd", lambda *a: pytest.fail("an SVD ran"))


@pytest.mark.parametrize("rank", [5, 0.8])
def test_the_second_time_the_bases_come_from_the_folder_bit_for_bit(
    stack, tmp_path, monkeypatch, rank
):
    first = BasisCache(tmp_path).bases(stack, rank)
    same(first, prolora.truncated_svd(stack, rank))
    no_svd(monkeypatch)
    again = BasisCache(tmp_path)
    same(again.bases(stack, rank), first)
    assert (again.hits, again.misses) == (4, 0)


def test_only_what_is_missing_is_computed(stack, tmp_path):
    BasisCache(tmp_path).bases(stack[:3], 5)
    cache = BasisCache(tmp_path)
    same(cache.bases(stack, 5), prolora.truncated_svd(stack, 5))
    assert (cache.hits, cache.misses) == (3, 1)


def test_another_rank_dtype_or_value_is_another_basis(stack, tmp_path):
    BasisCache(tmp_path).bases(stack, 5)
    for weights_, rank in ((stack, 6), (stack.float(), 5), (stack * 2, 5), (stack.mT, 5)):
        cache = BasisCache(tmp_path)
        cache.bases(weights_, rank)
        assert cache.hits == 0


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "flipped bit":
        content[-20] ^= 1
    elif how == "cut off":
        content = content[:-5]
    elif how == "garbage":
        content = b"not a basis"
    elif how == "empty":
        content = b""
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["flipped bit", "cut off", "garbage", "empty"])
def test_a_damaged_file_is_recomputed_and_mended(stack, tmp_path, how, caplog):
    wanted = BasisCache(tmp_path).bases(stack, 5)
    for path in tmp_path.rglob("*.safetensors"):
        damage(path, how)
    cache = BasisCache(tmp_path)
    same(cache.bases(stack, 5), wanted)
    assert cache.misses == 4 and "made again" in caplog.text
    mended = BasisCache(tmp_path)
    same(mended.bases(stack, 5), wanted)
    assert mended.hits == 4


def test_the_file_of_another_weight_is_not_believed(stack, tmp_path):
    BasisCache(tmp_path).bases(stack[:2], 5)
    one, two = tmp_path.rglob("*.safetensors")
    two.write_bytes(one.read_bytes())
    same(BasisCache(tmp_path).bases(stack[:2], 5), prolora.truncated_svd(stack[:2], 5))


def test_a_full_disk_costs_only_time(stack, tmp_path, monkeypatch, caplog):
    def full(*args):
        raise prolora.OutputError("no space left on device")

    monkeypatch.setattr(cache_module, "write_safetensors", full)
    same(BasisCache(tmp_path).bases(stack, 5), prolora.truncated_svd(stack, 5))
    assert "could not be kept" in caplog.text


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(prolora.OutputError, match="cache folder"):
        BasisCache(tmp_path / "file" / "cache")


def test_processes_that_fill_one_folder_at_once_agree(tmp_path):
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[2]); from spectra import weights; "
        "from prolora.bases.cache import BasisCache; "
        "stack = torch.stack([weights(60, 60, s) for s in range(12)]); "
        "print(float(BasisCache(sys.argv[1]).bases(stack, 5).S.double().sum()))"
    )
    tests = os.path.dirname(os.path.dirname(__file__))
    line = [sys.executable, "-c", code, str(tmp_path), tests]
    running = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {process.communicate()[0] for process in running}
    assert all(process.returncode == 0 for process in running) and len(said) == 1
    stack = torch.stack([weights(60, 60, s) for s in range(12)])
    cache = BasisCache(tmp_path)
    same(cache.bases(stack, 5), prolora.truncated_svd(stack, 5))
    assert cache.misses == 0


def test_a_transfer_with_a_warm_cache_writes_the_same_lora_without_an_svd(tmp_path, monkeypatch):
    lora, source, target = write_case(tmp_path)
    outs = [
        tmp_path / name for name in ("plain.safetensors", "cold.safetensors", "warm.safetensors")
    ]
    prolora.transfer_file(lora, source, target, outs[0], method="prolora")
    prolora.transfer_file(lora, source, target, outs[1], cache=tmp_path / "cache", method="prolora")
    no_svd(monkeypatch)
    prolora.transfer_file(lora, source, target, outs[2], cache=tmp_path / "cache", method="prolora")
    plain, cold, warm = (prolora.adapters.read(out) for out in outs)
    for name, update in plain.updates.items():
        for other in (cold, warm):
            torch.testing.assert_close(other.updates[name].dense(), update.dense())
