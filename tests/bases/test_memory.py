"""--max-memory: read as people write it, refused where it is too little, and kept to."""

import json
import math
import mmap
import subprocess
import sys

import pytest
import torch
from mini import write_case, write_folder
from safetensors.torch import save_file
from spectra import weights

import prolora
from prolora.bases import memory
from prolora.bases.memory import Memory, resident_bytes
from prolora.errors import TooLittleMemory
from prolora.files.sizes import format_size, parse_limit, parse_size


def test_sizes_are_read_as_people_write_them():
    wanted = {"2GiB": 2 << 30, "500MB": 500 * 10**6, "1.5g": 15 * 10**8, "64": 64, "3 kib": 3072}
    assert {text: parse_size(text) for text in wanted} == wanted
    for text in ("", "GiB", "0", "-1MB", "2 bananas", "1e9", "0.1", "٣GiB", "9" * 309):
        with pytest.raises(ValueError, match="2GiB"):
            parse_size(text)
    limits = {None: None, 5: 5, 2e9: 2_000_000_000, "2GiB": 2 << 30}
    assert {value: parse_limit(value) for value in limits} == limits
    for value in (math.nan, math.inf, 0.5, 0, -1, True, [], "lots"):
        with pytest.raises(ValueError, match="2GiB"):
            parse_limit(value)
    assert format_size(1536) == "1.5 KiB" and format_size(3 << 40) == "3072.0 GiB"


def test_a_bound_cuts_stacks_and_never_below_one():
    free, bound = Memory().room(), Memory(resident_bytes() + (400 << 20)).room()
    shape = (1280, 1280)
    assert 1 <= bound.stack(shape, "bases") < free.stack(shape, "bases")
    assert Memory(1).room().stack(shape, "bases") == 1
    # More threads factorise more weights at a time, and each takes its share of the bound.
    limit = resident_bytes() + (1000 << 20)
    whole, half = (Memory(limit).room(results=size) for size in (0, 500 << 20))
    assert half.stack(shape, "bases") < whole.stack(shape, "bases")


def test_a_gpu_takes_stacks_by_its_memory_and_within_the_bound(monkeypatch):
    shape, rank = (1280, 1280), 128
    monkeypatch.setattr(memory, "stack_budget", lambda device: 2 << 30)
    on_cpu = Memory(None, rank).room()
    free = Memory(None, rank, "cuda").room()
    bound = Memory(resident_bytes() + (1 << 30), rank, "cuda").room()
    for work in ("bases", "comparison", "affinity"):
        assert on_cpu.stack(shape, work) < bound.stack(shape, work) < free.stack(shape, work)
    assert 200 <= free.stack(shape, "bases") <= 320
    assert free.stack((20000, 20000), "bases") == 1
    assert free.columns(shape) > on_cpu.columns(shape)


@pytest.mark.parametrize("method", ["prolora", "copy", "auto"])
def test_too_little_is_refused_before_any_work_and_says_how_much_it_takes(
    tmp_path, monkeypatch, method
):
    lora, source, target = write_case(tmp_path)
    out = tmp_path / "out.safetensors"
    monkeypatch.setattr(prolora.Base, "read", lambda *a: pytest.fail("a weight was read"))
    with pytest.raises(TooLittleMemory, match=r"needs .* [MG]iB"):
        prolora.transfer(lora, source, target, out=out, method=method, max_memory=1 << 20)
    assert not out.exists()


@pytest.mark.skipif(sys.platform == "darwin", reason="only the peak is measured there")
def test_what_this_process_has_in_memory_is_measured():
    before = resident_bytes()
    with mmap.mmap(-1, 64 << 20) as block:  # of the system, and not what somebody gave back
        for page in range(0, len(block), 4096):
            block[page] = 1
        assert 60 << 20 < resident_bytes() - before < 70 << 20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="no peak of resident memory in /proc")
def test_loras_that_are_moved_together_stay_within_the_bound(tmp_path):
    """What projecting their factors takes beside them is the most, and is cut to fit."""
    name = "down_blocks.1.attentions.0.transformer_blocks.{}.attn1.to_q"
    modules = [name.format(i) for i in range(24)]
    weight = weights(640, 640, 1)
    for folder in "st":
        write_folder(tmp_path / folder, {key: weight.clone() for key in modules})
    for i in range(8):
        tensors = {}
        for module in modules:
            key = "lora_unet_" + module.replace(".", "_")
            tensors[f"{key}.lora_up.weight"] = torch.randn(640, 32).half()
            tensors[f"{key}.lora_down.weight"] = torch.randn(32, 640).half()
        save_file(tensors, tmp_path / f"lora{i}.safetensors")
    code = f"""
import json, torch, prolora
from pathlib import Path
from prolora.bases.memory import SLACK, resident_bytes
torch.set_num_threads(1)
folder = Path({str(tmp_path)!r})
options = {{"method": "prolora", "rank": 64, "threshold": 0, "again": True}}
loras = sorted(folder.glob("lora*.safetensors"))
prolora.transfer(loras[0], folder / "s", folder / "t", out=folder / "warm.safetensors",
                      cache=folder / "c", **options)
def peak():
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) << 10
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
bound = resident_bytes() + (160 << 20) + SLACK
done = prolora.transfer_many(loras, folder / "s", folder / "t", folder / "moved",
                             cache=folder / "c", max_memory=bound, **options)
print(json.dumps([bound, peak(), [outcome.status for outcome in done]]))
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    bound, within, statuses = json.loads(said.stdout)
    assert statuses == ["moved"] * 8 and within <= bound, (bound, within)


@pytest.mark.parametrize("bound", ["1MiB", 1 << 20])
def test_a_text_bounds_memory_as_a_number_does(tmp_path, bound):
    with pytest.raises(TooLittleMemory, match=r"1\.0 MiB` is too little"):
        prolora.transfer(*write_case(tmp_path), max_memory=bound)
