"""Files made to harm, and paths that the system does not give: refused by name, and quickly."""

import json
import os
import time
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
from damaged import damage
from lora_files import LINEAR, adapter_of, pair, save
from property_examples import examples
from test_unknown_tensors import KINDS, STEMS

import prolora
from prolora.errors import ProLoRAError, ShapeMismatch, UnsupportedFormat

STEM = "unet.mid_block.attentions.0.proj_in"
HUGE = 10**400


@pytest.mark.parametrize("number", [HUGE, -HUGE, 10**300], ids=["10^400", "-10^400", "10^300"])
@pytest.mark.parametrize("option", ["r", "lora_alpha", "rank_pattern", "alpha_pattern"])
def test_a_number_beyond_floating_point_is_refused(option, number):
    value = {"proj_in": number} if option.endswith("pattern") else number
    table = {"unet.r": 4, "unet.lora_alpha": 4} | {f"unet.{option}": value}
    header = {"lora_adapter_metadata": json.dumps(table)}
    lora = prolora.Lora.open(pair(STEM, (32, 32), ends=("lora_B", "lora_A")), header)
    with pytest.raises(UnsupportedFormat, match="is a number of"):
        prolora.convert(lora)
    assert prolora.check(lora).reason


def test_a_path_that_the_system_does_not_take_is_refused(tmp_path, monkeypatch):
    """A name that is too long, a folder without permission, a disk that fails."""
    said = "is too long for one" if os.name == "nt" else "use a shorter name"
    with pytest.raises(UnsupportedFormat, match=said):
        prolora.convert(tmp_path / ("x" * 300))

    def fail(_: Path) -> bool:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(Path, "is_file", fail)
    with pytest.raises(UnsupportedFormat, match="may be failing"):
        prolora.convert(tmp_path)


@pytest.mark.parametrize("end", ["", ".lora_up.weight", ".weight"])
def test_a_name_of_200_000_line_breaks_is_refused_at_once(end, tmp_path):
    path = save(tmp_path / "x.safetensors", {"lora_unet_" + "\n" * 200_000 + end: torch.ones(2, 2)})
    start = time.monotonic()
    for verb in (prolora.check, prolora.convert):
        with pytest.raises(UnsupportedFormat, match=r"a name of 2000\d\d characters") as refused:
            verb(path)
        assert len(str(refused.value)) < 1000
    assert time.monotonic() - start < 5


def test_weights_and_configuration_of_two_adapters_are_no_result(tmp_path):
    """What a run leaves that was killed between the two files, in versions before this."""
    for name, rank in (("a", 4), ("b", 2)):
        prolora.convert(adapter_of(LINEAR, rank=rank), out=tmp_path / name, format="peft")
    (tmp_path / "a" / "adapter_config.json").replace(tmp_path / "b" / "adapter_config.json")
    with pytest.raises(ValueError, match="belongs to another file"):
        prolora.convert(tmp_path / "b")


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight", "LLLite"),
        ("oft_unet_down_blocks_1_attentions_0_proj_in.oft_blocks", "OFT"),
    ],
)
def test_files_of_other_kinds_are_named(key, kind, tmp_path):
    path = save(tmp_path / "x.safetensors", {key: torch.ones(4, 2, 2)})
    with pytest.raises(UnsupportedFormat, match=kind):
        prolora.convert(path)
    assert kind in prolora.check(path).reason


def test_a_small_file_forms_no_weight_that_no_model_has():
    """A LoKr of 1 MB whose product takes 5 GB."""
    key = "lora_unet_mid_block_attentions_0_proj_in"
    halves = {f"{key}.lokr_w{i}": torch.ones(512, 512, dtype=torch.float16) for i in (1, 2)}
    with pytest.raises(ShapeMismatch, match="a larger weight than any model has"):
        prolora.convert(halves)


def write_damaged(path, number):
    """A file of one or two updates of any kinds, with one thing wrong with it."""
    torch.manual_seed(number)
    pick = Random(number)
    tensors = {}
    for stem in pick.sample(STEMS, k=pick.choice([1, 1, 2])):
        for suffix, shape in pick.choice(KINDS).items():
            tensors[f"{stem}.{suffix}"] = torch.randn(shape)
    save(path, tensors, {"ss_base_model_version": pick.choice(["sdxl_base_v1-0", "flux1"])})
    path.write_bytes(damage(path.read_bytes(), pick))


def read_peak():
    """The most memory this process had since `forget_peak`, in MB; 0 where no system tells it."""
    status = Path("/proc/self/status")
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) >> 10 if status.exists() else 0


def forget_peak():
    """Begins anew with what this process has now, where Linux does that."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def test_damaged_files_end_in_typed_errors_fast_and_in_little_memory(tmp_path):
    path, outcomes = tmp_path / "lora.safetensors", Counter()
    forget_peak()
    before = read_peak()
    for number in range(count := examples(800)):
        write_damaged(path, number)
        began = time.perf_counter()
        try:
            json.dumps(prolora.check(path).to_dict())
            prolora.convert(path)
            outcomes["read"] += 1
        except ProLoRAError as error:
            assert len(str(error)) > 20, error
            outcomes[type(error).__name__] += 1
        assert time.perf_counter() - began < 10, number
    assert read_peak() - before < 400
    assert outcomes["read"] > count / 20 and outcomes["UnsupportedFormat"] > count / 3, outcomes
