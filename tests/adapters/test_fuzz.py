"""Damaged adapter files through inspect, read and a dry run: typed errors only."""

import json
import re
import struct
import time
from collections import Counter
from functools import cache
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import save

from prolora import adapters, transfer
from prolora.adapters.keys.codec import Codec
from prolora.architectures.families import known_families
from prolora.architectures.family import Spelling
from prolora.architectures.layouts import load_layout
from prolora.checking.check import check
from prolora.errors import ProLoRAError

MODULE = "mid_block.attentions.0.proj_in"
STEMS = (
    "lora_unet_mid_block_attentions_0_proj_in",
    "lora_unet_middle_block_1_proj_in",
    "unet.mid_block.attentions.0.proj_in",
    "diffusion_model.middle_block.1.proj_in",
    "base_model.model.mid_block.attentions.0.proj_in",
    "lora_unet_double_blocks_0_img_attn_qkv",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    "transformer.transformer_blocks.0.attn.to_q",
    "diffusion_model.single_blocks.0.linear1",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    "lora_unet.mid_block.attentions.0.proj_in",
    "transformer.double_blocks.0.img_attn.qkv.1",
    "unet.middle_block.1.proj_in",
    "t5.encoder.block.0.layer.0.SelfAttention.q",
    "lora_unet_mid_block_attentions_0_norm",
    "lora_unet_final_layer_adaLN_modulation_1",
)
FURTHER = (Spelling("", "diffusers"), Spelling("lycoris_", "diffusers", dotted=False))
# The spelling of every file that a program reads, with its family.
SPELLED = [
    (family, spelling)
    for family in known_families().values()
    if not family.unet
    for spelling in (*family.spellings.values(), *FURTHER)
]
KINDS = (
    {"lora_up.weight": (14, 4), "lora_down.weight": (4, 12), "alpha": ()},
    {"lora_B.weight": (14, 4), "lora_A.weight": (4, 12)},
    {"lora_up.weight": (14, 4), "lora_down.weight": (4, 12), "dora_scale": (14, 1), "alpha": ()},
    {"lora_B.weight": (14, 4), "lora_A.weight": (4, 12), "lora_magnitude_vector": (14,)},
    {"lora_B.weight": (14, 4), "lora_A.weight": (4, 12), "magnitude": (14,)},
    {"lora_up.weight": (14, 4), "lora_down.weight": (4, 12), "alpha": (), "scale": ()},
    {"lora_B.weight": (14, 4), "lora_A.weight": (4, 12), "lora_gate": (14,)},
    {
        "lora_up.weight": (14, 4, 1, 1),
        "lora_mid.weight": (4, 4, 3, 3),
        "lora_down.weight": (4, 12, 1, 1),
    },
    {
        "hada_w1_a": (14, 4),
        "hada_w1_b": (4, 12),
        "hada_w2_a": (14, 4),
        "hada_w2_b": (4, 12),
        "alpha": (),
    },
    {
        "hada_w1_a": (4, 14),
        "hada_w1_b": (4, 12),
        "hada_w2_a": (4, 14),
        "hada_w2_b": (4, 12),
        "hada_t1": (4, 4, 3, 3),
        "hada_t2": (4, 4, 3, 3),
    },
    {"lokr_w1": (2, 4), "lokr_w2_a": (7, 2), "lokr_w2_b": (2, 3), "alpha": ()},
    {"lokr_w1_a": (2, 2), "lokr_w1_b": (2, 4), "lokr_w2": (7, 3), "alpha": ()},
    {"lokr_w1": (2, 4), "lokr_w2_a": (2, 7), "lokr_w2_b": (2, 3), "lokr_t2": (2, 2, 3, 3)},
    {"lora_B.weight": (84, 4), "lora_A.weight": (4, 12)},
    {"lora_up.weight": (84, 4), "lora_down.weight": (4, 12), "alpha": ()},
    {"diff": (14, 12), "diff_b": (14,), "w_norm": (14,)},
    {"w_norm": (14,), "b_norm": (14,)},
    {"diff": (14,), "diff_b": (14,)},
    {"lora_B.weight": (14, 4), "lora_A.weight": (4, 12), "lora_B.bias": (14,)},
    {"lora_up.weight": (14, 4), "lora_down.weight": (4, 12), "alpha": (1,), "scalar": ()},
    {"a1.weight": (12, 4), "a2.weight": (4, 12), "b1.weight": (14, 4), "b2.weight": (4, 12)},
    {"oft_blocks": (7, 2, 2), "rescale": (14, 1), "alpha": ()},
)
SUFFIXES = sorted({suffix for kind in KINDS for suffix in kind} | {"weight", "bias", "on_input"})
CONFIGS = (
    {"unet.r": 4, "unet.lora_alpha": 8},
    {"unet.r": 4, "unet.rank_pattern": {"(a|a)*b": 2}},
    {"unet.r": 8, "unet.rank_pattern": {r"^.*mid_block\.\w+.\d+\.proj_(in|out)$": 4}},
    {"r": 4, "lora_alpha": 1e308, "use_rslora": True},
    {"unet.r": "4"},
    [],
    {"unet.use_dora": True},
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8]
SECONDS = 10.0
MEGABYTES = 400


@cache
def early_modules(layout):
    """What lies in the first two blocks, and outside them."""
    names = load_layout(layout).shapes
    return [name for name in names if all(int(n) < 2 for n in re.findall(r"\.(\d+)\.", name))]


def choose_stems(random):
    """One to three modules of any spelling, or up to six of one family in one of its own."""
    if random.random() < 0.5:
        return random.choices(STEMS, k=random.choice([1, 1, 1, 2, 3]))
    family, spelling = random.choice(SPELLED)
    names = early_modules(random.choice(family.layouts))
    chosen = random.choices(names, k=random.choice([1, 2, 4, 6]))
    stems = [Codec(family, spelling=spelling).write(name) for name in chosen]
    if random.random() < 0.1:  # and a stranger among them
        stems.append(random.choice(STEMS))
    return [stem for stem in stems if stem]


def whole_file(random, bent=0.0):
    """A file of some kinds and spellings; a share `bent` of its tensors has odd shapes."""
    tensors = {}
    for stem in choose_stems(random):
        for suffix, shape in random.choice(KINDS).items():
            if random.random() < bent:
                shape = random.choice(
                    [
                        (),
                        (0,),
                        (1,),
                        shape[::-1],
                        shape[:-1],
                        (*shape, 1),
                        (14,),
                        (1, 14),
                        (4, 4, 4, 4),
                        (14, 12),
                        (3, 7),
                    ]
                )
            tensor = torch.randn(
                shape, generator=torch.Generator().manual_seed(random.randrange(9))
            )
            tensors[f"{stem}.{suffix}"] = tensor.to(random.choice(DTYPES[:3]))
    metadata = {"ss_base_model_version": random.choice(["sdxl_base_v1-0", "flux1", "sd_v2"])}
    if random.random() < 0.1:
        metadata["lora_adapter_metadata"] = json.dumps(random.choice(CONFIGS))
    return save(tensors, metadata)


def mutated(data, random):
    """The file with one to three things wrong with it."""
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        data = random.choice(MUTATIONS)(data, random)
    return data


def flipped(data, random):
    """A few bytes anywhere, mostly in the header."""
    data = bytearray(data)
    for _ in range(random.choice([1, 2, 8])):
        end = len(data) if random.random() < 0.3 else min(len(data), 600)
        if end:
            data[random.randrange(end)] = random.randrange(256)
    return bytes(data)


def cut(data, random):
    return data[: random.randrange(len(data) + 1)]


def grown(data, random):
    return data + random.randbytes(random.choice([1, 8, 4096]))


def not_finite(data, random):
    """NaN or Inf where the weights are."""
    at = random.randrange(len(data) // 2, max(9, len(data) - 4))
    value = struct.pack("<f", random.choice([float("nan"), float("inf"), 3e38, 1e-45]))
    return data[:at] + value + data[at + 4 :]


def in_header(change):
    """A mutation of the header's table; the data stays as it is."""

    def mutate(data, random):
        try:
            length = struct.unpack("<Q", data[:8])[0]
            table = json.loads(data[8 : 8 + length])
            keys = [key for key in table if key != "__metadata__"]
            if keys:
                change(table, keys, random)
            header = json.dumps(table).encode()
        except (ValueError, struct.error, AttributeError, TypeError, LookupError, RecursionError):
            return data
        return struct.pack("<Q", len(header)) + header + data[8 + length :]

    return mutate


def renamed(table, keys, random):
    key = random.choice(keys)
    stem, _, suffix = key.partition(".")
    name = random.choice(
        [
            f"{random.choice(STEMS)}.{random.choice(SUFFIXES)}",
            f"{stem}.{random.choice(SUFFIXES)}",
            key[: random.randrange(len(key) + 1)],
            f"{key}.{suffix}",
            key.upper(),
            "x" * 5000,
            key.replace("0", "9" * random.choice([1, 3, 400])),
            "." * 50,
            key.replace("_", "."),
        ]
    )
    table[name] = table.pop(key)


def reshaped(table, keys, random):
    entry = table[random.choice(keys)]
    shape = list(entry["shape"])
    random.shuffle(shape)
    entry["shape"] = random.choice(
        [
            shape,
            [*shape, 1],
            shape[:-1],
            [],
            [0],
            [1, *shape],
            [2**62, *shape],
            [0, *shape],
            [-1],
            None,
            "x",
            [shape[0] * shape[-1], 1] if shape else [1],
        ]
    )


def retyped(table, keys, random):
    kinds = ["F64", "F16", "BF16", "F8_E4M3", "I8", "U64", "BOOL", "F4", 7]
    table[random.choice(keys)]["dtype"] = random.choice(kinds)


def moved(table, keys, random):
    entry = table[random.choice(keys)]
    entry["data_offsets"] = random.choice(
        [
            [0, 0],
            [entry["data_offsets"][1], entry["data_offsets"][0]],
            [-8, 8],
            [0, 2**63],
            [0],
            {},
            table[random.choice(keys)]["data_offsets"],
        ]
    )


def dropped(table, keys, random):
    del table[random.choice(keys)]


def swapped(table, keys, random):
    first, second = random.choice(keys), random.choice(keys)
    table[first], table[second] = table[second], table[first]


def annotated(table, _, random):
    table["__metadata__"] = random.choice(
        [
            {"lora_adapter_metadata": json.dumps(random.choice(CONFIGS))},
            {"a": 1},
            [],
            "x",
            None,
            {"ss_tag_frequency": "[" * 3000},
            {"ss_tag_frequency": '{"a": {"b": 1e999}}'},
            {"lora_adapter_metadata": "{" * 3000},
            {"modelspec.trigger_phrase": "\x00"},
        ]
    )


MUTATIONS = [
    flipped,
    flipped,
    cut,
    grown,
    not_finite,
    not_finite,
    *map(
        in_header,
        [
            renamed,
            renamed,
            renamed,
            reshaped,
            reshaped,
            retyped,
            moved,
            dropped,
            swapped,
            annotated,
        ],
    ),
]


def base():
    """The base model of the modules above, as a mapping."""
    return {
        f"{MODULE}.weight": torch.randn(14, 12, generator=torch.Generator().manual_seed(0)),
        "down_blocks.0.attentions.0.proj_in.weight": torch.ones(4, 4),
    }


def fuzz(count, seed, folder):
    """Runs `count` mutated files and counts the outcomes; anything untyped is raised."""
    outcomes = Counter()
    weights = base()

    def read_weight(name):
        return weights[f"{name}.weight"]

    path = folder / "lora.safetensors"
    actions = {
        "inspect": lambda: check(path),
        "read": lambda: adapters.read_adapter(path, read_weight=read_weight),
        "dry run": lambda: transfer(path, weights, weights, dry_run=True).report,
    }
    for number in range(count):
        random = Random(f"{seed}/{number}")
        bent = random.choice([0.0, 0.0, 0.2])
        whole = whole_file(random, bent)
        path.write_bytes(whole if bent else mutated(whole, random))
        started = time.perf_counter()
        for name, action in actions.items():
            try:
                found = action()
            except ProLoRAError as error:
                assert len(str(error)) > 20, error
                outcomes[f"{name}: {type(error).__name__}"] += 1
            except Exception as error:
                raise AssertionError(f"{name} of file {seed}/{number}: {error!r}") from error
            else:
                outcomes[f"{name}: ok"] += 1
                if name == "inspect":
                    json.dumps(found.to_dict())
        assert time.perf_counter() - started < SECONDS, f"file {seed}/{number} takes too long"
    return outcomes


def memory():
    """The most memory this process had since `forget_peak`, in MB; 0 where no system tells it."""
    status = Path("/proc/self/status")
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) >> 10 if status.exists() else 0


def forget_peak():
    """Begins anew with what this process has now, where Linux does that."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


@pytest.mark.parametrize("count", [300, pytest.param(1500, marks=pytest.mark.slow)])
def test_mutated_files_end_in_typed_errors_fast_and_in_little_memory(tmp_path, count):
    whole = Random(0)
    (tmp_path / "lora.safetensors").write_bytes(whole_file(whole))
    forget_peak()
    before = memory()
    outcomes = fuzz(count, "ci", tmp_path)
    assert memory() - before < MEGABYTES
    # The mutations reach past the header: some files still read, and every error class is met.
    assert outcomes["read: ok"] > count / 30
    for error in ("UnsupportedFormat", "ShapeMismatch", "NonFiniteWeights"):
        assert outcomes[f"read: {error}"] >= max(1, count // 250), outcomes
