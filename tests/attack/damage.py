"""Every input with a part cut off, bits turned over, or a value that is another.

The outcome must be a refusal that says why, or the result of the undamaged input, or a result whose
report says what is missing. A file that stays valid is another input: what LoRAs, PEFT folders and
maps then say is worked out without prolora (contents.py), and the result must be that. Only those
bytes are flipped by which a file says what it holds: no format has a checksum of its weights.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import fleet_files
import mini
import numpy as np
from contents import (
    agree,
    read_kohya,
    read_peft,
    read_results,
    state_differences,
)
from damages import KINDS
from safetensors.torch import save_file
from sandbox import Box, Row, Run, choose, judge_ending

from prolora.cli.exits import ExitCode

REFUSALS = (ExitCode.REFUSED, ExitCode.NOT_FOR_IT)
Words = list[object]


def transfer(box: Box, *more: object, lora: str = "lora.safetensors") -> Words:
    """A transfer of the small LoRA, with a report."""
    return write_lora(box, "transfer", *more, lora=lora)


def write_lora(box: Box, verb: str, *more: object, lora: str = "lora.safetensors") -> Words:
    bases = ("--source", box.inputs / "source", "--target", box.inputs / "target")
    out = box.out / ("moved" if "peft" in lora else "moved.safetensors")
    report = ("--report", box.out / "report.json")
    return [verb, box.inputs / lora, *bases, "-o", out, *report, *more]


def copy(box: Box, *more: object, lora: str = "lora.safetensors") -> Words:
    """A transfer that changes no update, so that the result is known without prolora."""
    return transfer(box, "--method", "copy", "--cache=none", *more, lora=lora)


@dataclass(frozen=True)
class Format:
    """An input, and the commands that read it."""

    name: str  # of the format
    prepare: Callable[[Box], None]  # fills the box
    commands: Callable[[Box], Sequence[Words]]  # what is run once the input is damaged
    choose: Callable[[Box], list[Path]]  # the files of which one is damaged
    runs: int = 60  # how many at scale 1
    kinds: tuple[str, ...] = ("cut", "flip", "edit")  # of damage
    header: Callable[[bytes], int] = len  # how many bytes say what the file holds; None for all
    # whether the result is what the damaged input says, by another program; None where no other
    # program knows
    expect: Callable[[Box, set[str]], bool] | None = None
    exact: bool = True  # whether a result must be that of the undamaged file even after an `edit`


def run_format(form: Format, box: Box, scale: float, seed: int) -> Row:
    """Damages a file again and again, each time from the beginning."""
    row = Row("damage", form.name)
    box.begin()
    form.prepare(box)
    template = box.keep()
    whole = [box.must(*words) for words in form.commands(box)]
    assert all(not run.hung for run in whole)
    truth = Truth(read_results(box.out), state_differences(box.out / "report.json"))
    if not truth.results:
        raise RuntimeError(f"{form.name}: no result to compare with")
    for number in range(max(2, round(form.runs * scale))):
        random = choose(seed, form.name, number)
        box.begin(template)
        path = random.choice(sorted(form.choose(box)))
        data, kind = path.read_bytes(), random.choice(form.kinds)
        damaged, how = KINDS[kind](data, random, min(form.header(data), len(data)))
        if damaged == data:
            continue
        path.write_bytes(damaged)
        before, kept = box.look(), read_results(box.out)
        for words in form.commands(box):
            run = box.run(*words)
            ending = judge_ending(box, run, before)
            if ending:
                break
        name = path.relative_to(box.root)
        verdicts = ending or judge(form, box, run, truth, kept, kind)
        row.add(verdicts, f"{number}: {name}: {kind}, {how}", run)
    return row


@dataclass(frozen=True)
class Truth:
    """What the undamaged input gives: results, what the report says of them, failed moves."""

    results: dict[str, str]
    stated: set[str]


def judge(
    form: Format, box: Box, run: Run, truth: Truth, kept: dict[str, str], kind: str
) -> list[str]:
    """The verdicts on the results of a command that ended as it should."""
    found = read_results(box.out)
    said = state_differences(box.out / "report.json") - truth.stated
    if run.code == ExitCode.INCOMPLETE:  # it wrote the rest, and says which updates stay behind
        return ["stated"] if said or "stay behind" in run.text else ["silent"]
    if kind == "add":
        return ["refused"] if run.code in REFUSALS else ["silent"]
    wrong = {n for n, what in found.items() if what not in (truth.results.get(n), kept.get(n))}
    if run.code:
        verdicts = ["refused"] if run.code in REFUSALS else [f"exit code {run.code}"]
        # What was there before, and what other LoRAs became, may be there.
        return ["silent"] if wrong else verdicts
    if found == truth.results:
        return ["equal"]
    if form.expect is not None and form.expect(box, set(truth.results)):
        return ["equal"]
    if said or (kind == "edit" and not form.exact):
        return ["stated"]
    return ["silent"]


def safetensors_header(data: bytes) -> int:
    """Its length, and the eight bytes before it."""
    return 8 + int.from_bytes(data[:8], "little")


# --- LoRAs -----------------------------------------------------------------------------------


def write_case(box: Box) -> None:
    """A LoRA in kohya's spelling, and two bases."""
    mini.write_case(box.inputs)


def write_peft(box: Box) -> None:
    """The same as PEFT writes it."""
    write_case(box)
    folder, tensors = box.inputs / "peft", {}
    for key, tensor in mini.lora_tensors(4, None).items():
        stem, _, role = key.partition(".")
        name = next(n for n in mini.shapes(3) if stem == "lora_unet_" + n.replace(".", "_"))
        letter = "B" if role.startswith("lora_up") else "A"
        tensors[f"base_model.model.{name}.lora_{letter}.weight"] = tensor
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "use_rslora": False, "use_dora": False}
    config |= {"target_modules": ["to_q", "to_k", "to_v", "net.2"], "bias": "none"}
    config |= {"rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": False, "lora_bias": False}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def kohya_stem(module: str) -> str:
    """How kohya calls a module of the UNet."""
    return "lora_unet_" + module.replace(".", "_")


def is_same_kohya(box: Box, _: set[str]) -> bool:
    """Whether the result has what the LoRA says, for all modules that the target has."""
    wanted = set(map(kohya_stem, mini.shapes(2)))
    return agree(
        read_kohya(box.inputs / "lora.safetensors"),
        read_kohya(box.out / "moved.safetensors"),
        wanted,
    )


def is_same_peft(box: Box, _: set[str]) -> bool:
    """The same for PEFT folders."""
    wanted = {f"base_model.model.{name}" for name in mini.shapes(2)}
    return agree(read_peft(box.inputs / "peft"), read_peft(box.out / "moved"), wanted)


# --- bases -----------------------------------------------------------------------------------


def write_ggufs(box: Box) -> None:
    """Both bases as GGUF files, in float32 and in eight bits."""
    import gguf

    write_case(box)
    for name, weights in (("source", mini.source_weights()), ("target", mini.target_weights())):
        writer = gguf.GGUFWriter(str(box.inputs / f"{name}.gguf"), "flux")
        for number, (module, weight) in enumerate(weights.items()):
            kind = gguf.GGMLQuantizationType.F32
            stored = weight.numpy()
            if number % 2 and stored.shape[1] % 32 == 0:
                kind = gguf.GGMLQuantizationType.Q8_0
                stored = gguf.quants.quantize(np.ascontiguousarray(stored), kind)
            writer.add_tensor(f"{module}.weight", stored, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def gguf_header(data: bytes) -> int:
    """Where the table of tensors ends: after the last name, its shape, type and offset."""
    at = max(data.find(f"{name}.weight".encode()) + len(name) for name in mini.shapes(3))
    return at + 7 + 4 + 16 + 4 + 8


def transfer_ggufs(box: Box) -> list[Words]:
    words = transfer(box, "--cache=none")
    names = {box.inputs / name: box.inputs / f"{name}.gguf" for name in ("source", "target")}
    return [[names.get(word, word) for word in words]]


def write_shards(box: Box) -> None:
    """The source in three files with an index."""
    write_case(box)
    folder = box.inputs / "source"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    names, table = list(mini.source_weights().items()), {}
    for i in range(3):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-00003.safetensors"
        part = {f"{name}.weight": weight.contiguous() for name, weight in names[i::3]}
        save_file(part, folder / file)
        table |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": table}
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=1))


def spoil(data: bytes, random: Random, header: int) -> tuple[bytes, str]:
    """A number among the weights that is none: what no weight of a model is."""
    at = header + 4 * random.randrange((len(data) - header) // 4)
    value = random.choice((float("nan"), float("inf"), -float("inf")))
    return data[:at] + struct.pack("<f", value) + data[at + 4 :], f"bytes {at}: {value}"


def add(data: bytes, random: Random, header: int) -> tuple[bytes, str]:
    """A tensor that nobody knows, beside those of an update: it may be part of what that means."""
    table = json.loads(data[8:header])
    stem = random.choice([name for name in table if "lora_" in name and "." in name])
    stem = stem.partition(".lora_")[0].partition(".alpha")[0]
    word = random.choice(("gate", "magnitudes", "lora_extra.weight", "scale_2", "lora_C.weight"))
    end = len(data) - header
    shape = random.choice(([], [1], [24], [24, 1]))
    size = 4 * (shape[0] if shape else 1)
    table[f"{stem}.{word}"] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
    raw = json.dumps(table).encode()
    return (
        len(raw).to_bytes(8, "little") + raw + data[header:] + random.randbytes(size),
        f"{word} {shape} beside {stem}",
    )


KINDS |= {"spoil": spoil, "add": add}

# --- collections -----------------------------------------------------------------------------


def write_collection(box: Box) -> None:
    """A collection of four LoRAs, and a file that is none; two targets."""
    fleet_files.write_collection(box.inputs)


def migrate(box: Box) -> list[Words]:
    targets = ("--target", box.inputs / "target", "--target", box.inputs / "target2")
    source = ("--source", box.inputs / "source")
    return [["migrate", box.inputs / "loras", *source, *targets, "-o", box.out, "--cache=none"]]


def write_half(box: Box) -> None:
    """The same, all of it done."""
    write_collection(box)
    box.must(*migrate(box)[0])


def write_batch(box: Box) -> None:
    """Three LoRAs and what they became."""
    write_case(box)
    for name in ("a", "b", "c"):
        save_file(fleet_files.some_tensors(2, 12), box.inputs / f"{name}.safetensors")
    box.must(*move_batch(box)[0])


def move_batch(box: Box) -> list[Words]:
    loras = [box.inputs / f"{name}.safetensors" for name in ("a", "b", "c")]
    bases = ("--source", box.inputs / "source", "--target", box.inputs / "target")
    return [["transfer", *loras, *bases, "-o", box.out, "--cache=none"]]


# --- what prolora wrote itself ---------------------------------------------------------------


def write_map(box: Box) -> None:
    """A map of modules that exchanges the two blocks of the target."""
    write_case(box)
    table = {
        mini.BLOCK.format(to, module): mini.BLOCK.format(1 - to, module)
        for to in (0, 1)
        for module in mini.MODULES
    }
    (box.inputs / "map.json").write_text(json.dumps(table, indent=1))


def is_as_mapped(box: Box, _: set[str]) -> bool:
    """Whether each module of the target has the update that the map says, and no other has one."""
    try:
        table = json.loads((box.inputs / "map.json").read_text())
        sources = {kohya_stem(target): kohya_stem(source) for target, source in table.items()}
    except (ValueError, AttributeError):
        return False
    lora = read_kohya(box.inputs / "lora.safetensors") or {}
    expected = {target: lora[source] for target, source in sources.items() if source in lora}
    return agree(expected, read_kohya(box.out / "moved.safetensors"), set(expected))


def write_cache(box: Box) -> None:
    """A cache with the subspaces of both bases."""
    write_case(box)
    box.must(*use_cache(box)[0])
    for path in (box.out / "moved.safetensors", box.out / "report.json"):
        path.unlink()


def use_cache(box: Box) -> list[Words]:
    return [transfer(box, "--method", "prolora", "--rank", "4", "--cache", box.cache)]


def list_cache(box: Box) -> list[Path]:
    return [path for path in box.cache.rglob("*") if path.is_file()]


# --- pipelines -------------------------------------------------------------------------------


def write_pipelines(box: Box) -> None:
    """Two whole pipelines of a few thousand weights."""
    import tiny_pipelines
    from diffusers import UNet2DConditionModel

    tiny_pipelines.save(box.inputs / "source")
    tiny_pipelines.save(box.inputs / "target", seed=1)
    unet = UNet2DConditionModel.from_pretrained(box.inputs / "source" / "unet")
    updates = tiny_pipelines.updates(unet, ("attn1.to_v", "ff.net.2"))
    tiny_pipelines.write_lora(box.inputs / "lora.safetensors", updates)


FIT = ["--prompt", "cat", "--images", "1", "--steps", "1", "--size", "16"]
FIT += ["--fit-steps", "4", "--force"]


def fit(box: Box) -> list[Words]:
    return [write_lora(box, "fit", *FIT, "--cache=none", "--resume", box.cache / "kept")]


def write_fitted(box: Box) -> None:
    """What a fit kept; its result is gone."""
    write_pipelines(box)
    box.must(*fit(box)[0])
    for path in (box.out / "moved.safetensors", box.out / "report.json"):
        path.unlink()


def list_configurations(box: Box) -> list[Path]:
    """All by which a pipeline says what it is."""
    folder = box.inputs / "source"
    named = [folder / "model_index.json", *sorted(folder.glob("*/*config.json"))]
    return [path for path in named if path.parent.name != "vocabulary"]


CHANGES = (
    ("unet/config.json", "norm_eps", 0.5),
    ("unet/config.json", "attention_head_dim", 4),
    ("unet/config.json", "norm_num_groups", 2),
    ("unet/config.json", "act_fn", "gelu"),
    ("unet/config.json", "flip_sin_to_cos", False),
    ("unet/config.json", "freq_shift", 1),
    ("unet/config.json", "mid_block_scale_factor", 2.0),
    ("unet/config.json", "resnet_time_scale_shift", "scale_shift"),
    ("scheduler/scheduler_config.json", "beta_end", 0.02),
    ("scheduler/scheduler_config.json", "beta_schedule", "linear"),
    ("text_encoder/config.json", "layer_norm_eps", 0.5),
    ("text_encoder/config.json", "hidden_act", "gelu"),
    ("text_encoder/config.json", "num_attention_heads", 4),
    ("tokenizer/tokenizer_config.json", "model_max_length", 6),
)
"""What a pipeline's answers depend on beside its weights."""


def run_resumed(box: Box, scale: float, seed: int) -> Row:
    """A pipeline is configured otherwise when a fit is resumed.

    The result must be that of a fit that resumes nothing, or the change is refused.
    """
    row = Row("damage", "fit resumed after a change")
    box.begin()
    write_fitted(box)
    template = box.keep()
    chosen = choose(seed, "resumed").sample(CHANGES, max(1, min(14, round(14 * scale))))
    for name, key, value in chosen:
        box.begin(template)
        path, kept = box.inputs / "source" / name, box.cache / "kept"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        before = box.look()
        kept.rename(box.cache / "aside")
        box.run(*fit(box)[0], seconds=60)
        truth = read_results(box.out)
        shutil.rmtree(box.out)
        box.out.mkdir()
        shutil.rmtree(kept, ignore_errors=True)
        (box.cache / "aside").rename(kept)
        run = box.run(*fit(box)[0], seconds=60)
        verdicts = judge_ending(box, run, before)
        if not verdicts and run.code:
            verdicts = ["refused"] if run.code in REFUSALS else [f"exit code {run.code}"]
        elif not verdicts:
            verdicts = ["equal" if read_results(box.out) == truth else "silent"]
        row.add(verdicts, f"{name}: {key} is {value!r}", run)
    return row


FORMATS = [
    Format(
        "LoRA, kohya",
        write_case,
        lambda box: [copy(box)],
        lambda box: [box.inputs / "lora.safetensors"],
        120,
        ("cut", "flip", "edit", "add"),
        header=safetensors_header,
        expect=is_same_kohya,
    ),
    Format(
        "PEFT configuration",
        write_peft,
        lambda box: [copy(box, lora="peft")],
        lambda box: [box.inputs / "peft" / "adapter_config.json"],
        120,
        expect=is_same_peft,
    ),
    Format(
        "PEFT weights",
        write_peft,
        lambda box: [copy(box, lora="peft")],
        lambda box: [box.inputs / "peft" / "adapter_model.safetensors"],
        60,
        ("cut", "flip", "edit", "add"),
        header=safetensors_header,
        expect=is_same_peft,
    ),
    Format(
        "base, safetensors",
        write_case,
        lambda box: [transfer(box, "--cache=none")],
        lambda box: list(box.inputs.glob("*/*.safetensors")),
        120,
        ("cut", "flip", "edit", "spoil"),
        safetensors_header,
    ),
    Format(
        "base, config.json",
        write_case,
        lambda box: [transfer(box, "--cache=none")],
        lambda box: list(box.inputs.glob("*/config.json")),
        60,
    ),
    Format(
        "base, GGUF",
        write_ggufs,
        transfer_ggufs,
        lambda box: list(box.inputs.glob("*.gguf")),
        120,
        ("cut", "flip", "flip", "stamp"),
        gguf_header,
    ),
    Format(
        "index of shards",
        write_shards,
        lambda box: [transfer(box, "--cache=none")],
        lambda box: list(box.inputs.glob("source/*.index.json")),
    ),
    Format(
        "map of modules",
        write_map,
        lambda box: [copy(box, "--match", box.inputs / "map.json")],
        lambda box: [box.inputs / "map.json"],
        expect=is_as_mapped,
    ),
    Format(
        "notes of a migration",
        write_half,
        migrate,
        lambda box: list(box.out.rglob("*.failed.json")),
        12,
    ),
    Format(
        "results of a batch",
        write_batch,
        move_batch,
        lambda box: list(box.out.glob("*.safetensors")),
        60,
        header=safetensors_header,
    ),
    Format("cache", write_cache, use_cache, list_cache, 60, ("cut", "flip", "stamp")),
    Format("pipeline's configurations", write_pipelines, fit, list_configurations, 12),
    Format("state of a fit", write_fitted, fit, list_cache, 12, ("cut", "flip", "stamp")),
]


def list_cases() -> dict[str, Callable[[Box, float, int], Row]]:
    """Name -> what runs it, of all formats."""
    cases = {form.name: partial(run_format, form) for form in FORMATS}
    return cases | {"fit resumed after a change": run_resumed}
