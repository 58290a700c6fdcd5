"""PEFT's tables of ranks and alphas: read as PEFT reads them, and never run."""

import json
import math
import re
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_files import DEEP, LINEAR, pair, save
from property_examples import examples

import prolora
from prolora.adapters.formats.peft_config import scaling_from_config
from prolora.errors import ProLoRAError, UnsupportedFormat

ENDLESS = r"(\w|.)+#"
NAMES = ["proj_out", "blocks.0.proj_out", "blocks.12.proj_out", "a", "x.a", "a.b", "b.ff", "c.b.ff"]
NAMES += [f"model.layers.{i}.self_attn.q_proj" for i in (0, 10)]
NAMES += ["layers.0.mlp.gate_proj", *LINEAR, DEEP]


def peft_value(table, name):
    """What PEFT itself gives a module, in the words of its own loader."""
    from peft.utils.other import get_pattern_key

    return table.get(get_pattern_key(table, name), 8)


@pytest.mark.parametrize(
    "pattern",
    [
        *(r"^model\.layers\.0\.", r"^model.layers.[0-5].self_attn.q_proj", r".*\.q_proj"),
        *("^.*layers.*$", r".*mlp\.(gate|up|down)_proj", r".*blocks\.\d+\.proj_out"),
        *(r"model\.layers\.(?:0|1)\.self_attn\.q_proj$", r"blocks.[^.]+.proj_out", r"\w+"),
        *(".+b", "^a", "", ".*", "proj", "out$", "(a|b)", f"{DEEP}.ff"),
    ],
)
def test_what_users_of_peft_write_picks_the_modules_that_it_picks_there(pattern):
    scaling = scaling_from_config({"r": 8, "rank_pattern": {pattern: 3, "a": 5}}, "here")
    for name in NAMES:
        assert scaling.rank(name) == peft_value({pattern: 3, "a": 5}, name), name


ATOMS = st.sampled_from(["a", "b", "_", "1", ".", r"\.", r"\d", r"\w", "[ab]", "[0-9]", "[^.]"])
PIECES = st.tuples(ATOMS, st.sampled_from(["", "", "", "*", "+"])).map("".join)
CHOICES = st.lists(st.text("ab.", max_size=3), min_size=1, max_size=2).map(
    lambda texts: f"({'|'.join(texts)})"
)
PATTERNS = st.tuples(
    st.sampled_from(["", "^"]),
    st.lists(PIECES | CHOICES, max_size=6).map("".join),
    st.sampled_from(["", "$"]),
).map("".join)


@settings(max_examples=examples(400))
@given(PATTERNS, st.text("ab_1.", min_size=1, max_size=12))
def test_a_pattern_that_is_read_means_what_it_means_in_peft(pattern, name):
    scaling = scaling_from_config({"r": 8, "rank_pattern": {pattern: 3}}, "here")
    assert scaling.rank(name) == peft_value({pattern: 3}, name), (pattern, name)


@settings(max_examples=examples(400))
@given(st.text(r"ab1.\d|()[]{}*+?^$-:=!<#" + "\n", max_size=10), st.text("ab1.", max_size=8))
def test_any_other_text_is_refused_by_name_or_means_the_same(pattern, name):
    try:
        scaling = scaling_from_config({"r": 8, "rank_pattern": {pattern: 3}}, "here")
    except UnsupportedFormat as error:
        assert "no foreign regular expression is run" in str(error) and "rank_pattern" in str(error)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert scaling.rank(name) == peft_value({pattern: 3}, name), (pattern, name)


@pytest.mark.parametrize(
    "pattern",
    [ENDLESS, "(a+)+b", "(?=a)b", "a{1,99}", "a??", "x|y", "(", "[b-a]", "\\", "a" * 2000],
)
@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_a_regular_expression_beyond_that_is_refused_by_name_at_once(pattern, option):
    began = time.monotonic()
    with pytest.raises(UnsupportedFormat) as refused:
        scaling_from_config({"r": 8, option: {pattern: 4}}, "here").scale("a" * 60 + "b")
    assert f"here: {option} has {pattern!r:.100}" in str(refused.value)
    assert time.monotonic() - began < 1


def test_wildcards_made_to_be_slow_are_not():
    """A backtracking matcher takes the 40th power of the length; ours its product with theirs."""
    table = {".*a" * (40 + i) + "[cd]": 4 for i in range(60)} | {".*a" * 40 + "b": 4}
    scaling = scaling_from_config({"r": 8, "rank_pattern": table}, "here")
    began = time.monotonic()
    assert scaling.rank("a" * 200) == 8 and scaling.rank("a" * 200 + "b") == 4
    assert time.monotonic() - began < 1


def test_a_table_for_every_module_of_the_largest_models_is_read_in_seconds():
    names = [f"blocks.{i}.attn.to_{leaf}" for i in range(250) for leaf in "qkvo"]
    config = {"r": 8, "rank_pattern": {name: 1 + i % 7 for i, name in enumerate(names)}}
    began = time.monotonic()
    scaling = scaling_from_config(config, "here")
    assert [scaling.rank(name) for name in names] == [1 + i % 7 for i in range(len(names))]
    assert time.monotonic() - began < 6


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank_pattern": {f"m{i}": 4 for i in range(20_000)}}, "20000 patterns, more than any"),
        ({"alpha_pattern": {f".*m{i}.*": 4 for i in range(300)}}, "64 patterns with wildcards"),
        ({"rank_pattern": {"(a|b|c)" * 9: 4}}, "no foreign regular expression"),
        ({"rank_pattern": {"a": "4"}}, "the pattern 'a' is '4', not a number"),
        ({"rank_pattern": {"a": [4]}}, "not a number"),
        ({"use_rslora": "false"}, "use_rslora is 'false', neither true nor false"),
        ({"use_dora": 1}, "use_dora is 1, neither"),
        ({"use_dora": {}}, "use_dora is {}, neither"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "biases"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"peft_type": "BOFT"}, "'BOFT'"),
        ({"peft_type": ["LORA"]}, "PEFT method"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"rank_pattern": {"a": 0}}, "whole number"),
        ({"rank_pattern": [1]}, "rank_pattern is not a JSON object"),
        ({"r": 0}, "whole number"),
        ({"r": True}, "not a number"),
        ({"lora_alpha": math.inf}, "not a number"),
        ({"lora_alpha": "8"}, "not a number"),
    ],
)
def test_a_configuration_of_other_kinds_or_sizes_or_of_more_than_up_times_down_is_refused(
    config, message
):
    with pytest.raises(UnsupportedFormat, match=re.escape(message)):
        scaling_from_config({"r": 8} | config, "here")


def peft_folder(folder, **config):
    """A folder as PEFT writes it, of one module and rank 4."""
    folder.mkdir()
    stem = "base_model.model.mid_block.attentions.0.proj_in"
    save(folder / "adapter_model.safetensors", pair(stem, (32, 32), ends=("lora_B", "lora_A")))
    table = {"peft_type": "LORA", "r": 4, "lora_alpha": 4} | config
    (folder / "adapter_config.json").write_text(json.dumps(table))
    return folder


def test_the_weights_of_a_folder_have_the_scale_of_the_configuration_beside_them(tmp_path):
    folder = peft_folder(tmp_path / "x", lora_alpha=8)
    weights = folder / "adapter_model.safetensors"
    loras = folder, weights
    whole, alone = (prolora.convert(lora, format="kohya").state_dict() for lora in loras)
    assert whole.keys() == alone.keys() and all(torch.equal(whole[k], alone[k]) for k in whole)
    checks = [prolora.check(lora) for lora in loras]
    for answer in checks:
        (part,) = answer.parts.values()
        assert answer.format == "peft" and part.scales == {"2": 1}
    assert checks[0].to_dict() | {"path": ""} == checks[1].to_dict() | {"path": ""}
    copied = shutil.copy(weights, tmp_path / "adapter_model.safetensors")
    (part,) = prolora.check(copied).parts.values()
    assert part.scales == {"1": 1}


def test_a_configuration_that_is_too_large_is_refused_before_it_is_parsed(tmp_path):
    folder = peft_folder(tmp_path / "x", note="x" * (4 << 20))
    with pytest.raises(UnsupportedFormat, match="too large"):
        prolora.convert(folder)


def test_a_folder_with_an_endless_pattern_is_described_and_stops_no_other(tmp_path):
    good = peft_folder(tmp_path / "good")
    bad = peft_folder(tmp_path / "bad", rank_pattern={ENDLESS: 4})
    found = prolora.check(bad)
    assert found.reason and "rank_pattern" in found.reason
    base = {"mid_block.attentions.0.proj_in.weight": torch.randn(32, 32)}
    file = save(tmp_path / "base.safetensors", base)
    how = {"method": "copy", "again": True, "dry_run": True}
    found = prolora.migrate([bad, good], file, file, tmp_path / "moved", **how)
    refused = {Path(moved.lora).name: "rank_pattern" in moved.error for moved in found}
    assert refused == {"bad": True, "good": False}
    outcomes = prolora.transfer_many([bad, good], base, base, tmp_path / "out", method="copy")
    assert [bool(outcome.error) for outcome in outcomes] == [True, False]
    assert "rank_pattern" in str(outcomes[0].error)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
OPTIONS = st.sampled_from(
    [
        *("r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
        *("peft_type", "bias", "init_lora_weights", "modules_to_save", "lora_bias"),
    ]
)
TABLES = st.dictionaries(st.text(max_size=6) | PATTERNS, VALUES | st.integers(1, 9), max_size=3)


@settings(max_examples=examples(400))
@given(st.dictionaries(OPTIONS, VALUES | TABLES | st.integers(1, 9), max_size=5))
def test_any_configuration_is_read_or_refused_with_a_reason(config):
    tensors = pair("unet.mid_block.attentions.0.proj_in", (6, 5), ends=("lora_B", "lora_A"))
    text = json.dumps({f"unet.{option}": value for option, value in config.items()})
    try:
        adapter = prolora.convert(
            prolora.Lora.open(tensors, {"lora_adapter_metadata": text})
        ).adapter
    except ProLoRAError as error:
        assert len(str(error)) > 20
    else:
        assert adapter.updates
