"""What the header of a written LoRA says of it, and what goes because it is of the old file."""

import json

import pytest
import torch
from lora_files import LINEAR, adapter_of

import prolora
from prolora.adapters.formats.metadata import find_ids, rewrite_metadata
from prolora.architectures.families import known_families

KOHYA = {
    "ss_base_model_version": "sd_v1",
    "ss_sd_model_name": "old.safetensors",
    "ss_sd_model_hash": "1234abcd",
    "ss_new_sd_model_hash": "ff" * 32,
    "ss_v2": "True",
    "ss_tag_frequency": '{"10_cat": {"cat": 10}}',
    "ss_training_comment": "made with care",
    "ss_output_name": "my cat",
    "ss_network_dim": "16",
    "ss_network_alpha": "8",
    "sshs_model_hash": "aa" * 32,
    "sshs_legacy_hash": "bbbbbbbb",
    "modelspec.architecture": "stable-diffusion-v1/lora",
    "modelspec.implementation": "sd-scripts",
    "modelspec.trigger_phrase": "a cat",
    "modelspec.hash_sha256": "0xcc",
    "lora_adapter_metadata": "{}",
    "prolora.source": "older",
}
KEPT = ("ss_tag_frequency", "ss_output_name", "modelspec.trigger_phrase")
KEPT += ("modelspec.implementation", "ss_network_dim", "ss_network_alpha")
OF_THE_OLD_FILE = {"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"}


def moved(old=KOHYA, layout="sdxl"):
    provenance = {"source": "old", "method": "prolora"}
    return rewrite_metadata(old, target_name="new", target_layout=layout, provenance=provenance)


def test_a_moved_header_keeps_how_the_lora_is_used_and_names_the_new_base():
    metadata = moved()
    own = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "ss_sd_model_name": "new",
        "ss_v2": "False",
        "modelspec.merged_from": "my cat, new",
        "ss_training_comment": "made with care; moved from old to new by prolora",
        "modelspec.sai_model_spec": "1.0.1",  # as managers require it, and no date: equal bits
        "modelspec.title": "my cat",
        "prolora.source": "old",
        "prolora.method": "prolora",
    }
    left = {key: KOHYA[key] for key in metadata.keys() - own.keys()}
    assert metadata == own | left and {*KEPT} <= left.keys()
    assert "ss_new_sd_model_hash" not in metadata and not OF_THE_OLD_FILE & metadata.keys()
    unknown = moved(layout=None)
    gone = {"ss_base_model_version", "modelspec.architecture", "ss_v2", "ss_sd_model_hash"}
    assert not (gone | {"ss_new_sd_model_hash"}) & unknown.keys()
    bare = moved({}, "ssd-1b")
    assert bare["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert bare["ss_training_comment"] == "moved from old to new by prolora"
    for layout, kept in (("sd15", True), ("sdxl", False)):
        given = KOHYA | {"modelspec.prediction_type": "v", "modelspec.date": "2024-01-01"}
        result = moved(given, layout)
        assert ("modelspec.prediction_type" in result) is kept
        assert result["modelspec.date"] == "2024-01-01"


FORMATS = ["kohya", "diffusers", "peft", "comfy"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rank", "stated"), [(4, "4"), ([4, 2], "Dynamic"), (None, None)])
def test_rank_and_alpha_in_the_header_are_those_of_the_file_and_old_hashes_go(
    tmp_path, format, rank, stated
):
    """A1111 shows a rank; a header that had none gets one in the format that has it."""
    stale = KOHYA | {"lora_adapter_metadata": json.dumps({"unet.r": 99, "unet.lora_alpha": 1})}
    adapter = adapter_of(LINEAR, rank or 4, metadata=stale if rank else {})
    out = tmp_path / ("out" if format == "peft" else "out.safetensors")
    prolora.convert(adapter, out=out, format=format)
    metadata = prolora.Lora.open(out).metadata
    stated = "4" if not rank and format == "kohya" else stated
    assert (metadata.get("ss_network_dim"), metadata.get("ss_network_alpha")) == (stated, stated)
    assert not OF_THE_OLD_FILE & metadata.keys()
    assert "99" not in metadata.get("lora_adapter_metadata", "")
    assert not rank or metadata["ss_tag_frequency"] == KOHYA["ss_tag_frequency"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_lokr_becomes_a_plain_lora_in_every_format_and_its_header_says_so(tmp_path, format):
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    w1, w2 = torch.randn(3, 2), torch.randn(4, 5)
    header = {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "lokr"}'}
    lora = prolora.Lora.open({f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2}, header)
    out = tmp_path / ("out" if format == "peft" else "out.safetensors")
    made = prolora.convert(lora, out=out, format=format, dtype="float32")
    assert [row.reason for row in made.report.modules] == ["lokr"]
    (update,) = prolora.convert(out).adapter.updates.values()
    torch.testing.assert_close(update.dense(), torch.kron(w1, w2), rtol=1e-5, atol=1e-5)
    metadata = prolora.Lora.open(out).metadata
    assert metadata["ss_network_module"] == "networks.lora" and "ss_network_args" not in metadata
    ends = {key.partition(".")[2] for key in prolora.Lora.open(out).tensors}
    assert format != "kohya" or ends == {"lora_up.weight", "lora_down.weight", "alpha"}


def test_ids_of_layouts_are_what_their_families_are_known_by():
    """sd-scripts and musubi-tuner write them, and `claims` of a family has what they begin with."""
    students = {"ssd-1b", "segmind-vega", "koala-1b", "koala-700m"}  # listed with SDXL
    students |= {"bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"}  # with SD1.5
    known = 0
    for family in known_families().values():
        for layout in set(family.layouts) - students:
            for name in filter(None, find_ids(layout)):
                assert any(name.lower().startswith(start) for start in family.claims), layout
                known += 1
    assert known > 50
    assert all(find_ids(layout).architecture for layout in students)
    assert find_ids("other") == find_ids(None) == (None, None)
