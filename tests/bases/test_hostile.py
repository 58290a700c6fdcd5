"""Checkpoints made to harm: a typed error or a base, in bounded time and memory, never a crash."""

import json
import random
import sys
import time

import pytest
from checkpoints import sparse_file, sparse_shards
from damaged import damage
from fresh import run_fresh
from property_examples import examples

from prolora import open_base
from prolora.errors import ProLoRAError, UnsupportedFormat

Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
KEYS = {f"{Q}.weight": (4, 4), "conv_in.weight": (4, 4, 3, 3)}
# Headers of every spelling, so that mutations reach every reader.
SEEDS = [
    KEYS,
    {
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight": (4, 4),
        "model.diffusion_model.input_blocks.3.0.op.weight": (4, 4, 3, 3),
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (8, 2),
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": (6, 2),
        "conditioner.embedders.1.model.text_projection": (2, 2),
    },
    {
        "double_blocks.0.img_attn.qkv.weight": (12, 4),
        "single_blocks.0.linear1.weight": (28, 4),
        "final_layer.adaLN_modulation.1.weight": (8, 4),
    },
    {"joint_blocks.0.x_block.attn.qkv.weight": (12, 4), "x_embedder.proj.weight": (4, 2, 2, 2)},
    {"blocks.0.cross_attn.kv_linear.weight": (8, 4), "blocks.0.scale_shift_table": (6, 4)},
]


def seed_file(path, number):
    """One of the headers, some with scaled float8."""
    keys = SEEDS[number % len(SEEDS)]
    if number < len(SEEDS):
        return sparse_file(path, keys)
    names = [key.removesuffix(".weight") for key in keys if key.endswith(".weight")]
    scales = {f"{name}.weight_scale": ("F32", (1,)) for name in names}
    note = json.dumps({"layers": {name: {"format": "float8_e4m3fn"} for name in names}})
    return sparse_file(
        path, keys, "F8_E4M3", other=scales, metadata={"_quantization_metadata": note}
    )


def test_damaged_files_give_a_base_or_a_typed_error(tmp_path):
    path, refused = tmp_path / "damaged.safetensors", 0
    whole = [seed_file(path, i).read_bytes() for i in range(2 * len(SEEDS))]
    for number in range(count := examples(6000)):
        content = damage((pick := random.Random(number)).choice(whole), pick)
        path.unlink()  # a new file: truncating one that was just written waits for the disk
        path.write_bytes(content)
        try:
            base = open_base(path)
            for module in base.shapes:
                assert tuple(base.read(module).shape) == base.shapes[module], number
        except ProLoRAError as error:
            assert str(error)
            refused += 1
    assert 0.35 * count < refused < 0.9 * count


def test_an_index_cannot_point_out_of_its_folder_nor_to_what_is_missing(tmp_path):
    sparse_file(tmp_path / "secret.safetensors", KEYS)
    folder = sparse_shards(tmp_path / "unet", KEYS, 1)
    index = next(folder.glob("*.json"))
    name = next(folder.glob("*.safetensors")).name
    for escape in (
        "../secret.safetensors",
        "..\\secret.safetensors",
        "C:secret.safetensors",  # in the working folder of a drive
        "x/../../secret.safetensors",
        str(tmp_path / "secret.safetensors"),
        "secret.safetensors\0.safetensors",
        7,
        None,
        ["secret.safetensors"],
        "s" * 244 + ".safetensors",  # one more than file systems take
    ):
        index.write_text(json.dumps({"weight_map": {f"{Q}.weight": escape}}))
        with pytest.raises(UnsupportedFormat, match="not a file beside it"):
            open_base(tmp_path / "unet")
    for gone in ("gone.safetensors", "s" * 243 + ".safetensors"):
        index.write_text(json.dumps({"weight_map": {f"{Q}.weight": gone}}))
        with pytest.raises(UnsupportedFormat, match=f"the shard {gone} is missing"):
            open_base(tmp_path / "unet")
    index.write_text(json.dumps({"weight_map": {"conv_out.weight": name}}))
    with pytest.raises(UnsupportedFormat, match="which lacks it"):
        open_base(tmp_path / "unet")


def test_an_index_of_absurd_size_is_not_parsed(tmp_path):
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    with open(index, "wb") as file:
        file.truncate(2**25 + 1)
    with pytest.raises(UnsupportedFormat, match="too large"):
        open_base(tmp_path)


@pytest.mark.parametrize(
    "form",
    [
        "authors",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("diffusers", "ldm", "scaled")),
    ],
)
def test_tens_of_thousands_of_keys_open_in_seconds(form, tmp_path):
    """Time grows with the keys and not with their square."""
    block = "down_blocks.{}.attentions.0.transformer_blocks.{}.attn1.to_q.weight"
    names = {
        "ldm": "model.diffusion_model.input_blocks.{}.1.transformer_blocks.{}.attn1.to_q.weight",
        "authors": "double_blocks.{}.img_mlp.{}.weight",
    }.get(form, block)
    keys = {
        names.format(1 + i % 300 if form == "ldm" else i % 1000, i): (1, 1) for i in range(COUNT)
    }
    scaled = form == "scaled"
    other = {k.replace(".weight", ".weight_scale"): ("F32", (1,)) for k in keys} if scaled else {}
    dtype = "F8_E4M3" if scaled else "F16"
    path = sparse_file(tmp_path / "x.safetensors", keys, dtype, other=other)
    started = time.process_time()  # other load on the machine must not fail a test
    try:
        base = open_base(path)
        assert len(base.shapes) == len(keys) and base.layout is None
    except UnsupportedFormat as error:
        assert form in ("ldm", "authors") and "belongs to no known module" in str(error)
    assert time.process_time() - started < 2.25


def opening_peak(*paths):
    """How far the resident memory of a fresh process rises while it opens bases, in bytes."""
    program = """
import sys, prolora
prolora.open_base, prolora.ProLoRAError  # loads torch, which is no part of opening
def peak():
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) << 10
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = peak()
for path in sys.argv[1:]:
    try:
        prolora.open_base(path)
    except prolora.ProLoRAError:
        pass
print(peak() - before)
"""
    return int(run_fresh(program, *paths))


COUNT = 15_000
needs_peak = pytest.mark.skipif(sys.platform != "linux", reason="no peak of memory in /proc")


@needs_peak
def test_opening_what_claims_a_terabyte_takes_no_memory(tmp_path):
    """Half a terabyte of hole on the disk, and a header that says so."""
    path = tmp_path / "x.safetensors"
    try:
        sparse_file(path, {f"{Q}.weight": (2**19, 2**18)}, "F32")
    except OSError:
        pytest.skip("this file system takes no sparse files of that size")
    assert list(open_base(path).shapes.values()) == [(2**19, 2**18)]
    assert opening_peak(path) < 20 << 20


@pytest.mark.slow
@needs_peak
def test_a_header_of_nothing_but_brackets_takes_bounded_memory(tmp_path):
    """The largest that is read at all; parsed, it is many times its text."""
    paths = []
    for filler in (b"[],", b"{},", b'"ab",', b"1234,"):
        text = b'{"a":[' + filler * ((2**25 - 20) // len(filler)) + b"0]}"
        paths.append(tmp_path / f"{len(paths)}.safetensors")
        paths[-1].write_bytes(len(text).to_bytes(8, "little") + text)
    assert opening_peak(*paths) < 1_200_000 << 10
