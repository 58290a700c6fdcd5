import json

import pytest
from lora_files import LINEAR, adapter_of

from prolora import adapters
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


def moved(**options):
    arguments = dict(
        target_name="new", target_layout="sdxl", provenance={"source": "old", "method": "prolora"}
    )
    return rewrite_metadata(KOHYA, **{**arguments, **options})


def test_what_says_how_the_lora_is_used_is_kept():
    metadata = moved()
    for key in (
        "ss_tag_frequency",
        "ss_output_name",
        "modelspec.trigger_phrase",
        "modelspec.implementation",
    ):
        assert metadata[key] == KOHYA[key]


def test_the_base_model_becomes_the_target():
    metadata = moved()
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["ss_sd_model_name"] == "new"
    assert "ss_new_sd_model_hash" not in metadata
    assert metadata["ss_v2"] == "False"
    assert metadata["modelspec.merged_from"] == "my cat, new"
    assert metadata["ss_training_comment"] == "made with care; moved from old to new by prolora"


def test_what_is_not_known_of_the_target_is_removed():
    metadata = moved(target_layout=None)
    for key in (
        "ss_base_model_version",
        "modelspec.architecture",
        "ss_v2",
        "ss_sd_model_hash",
        "ss_new_sd_model_hash",
    ):
        assert key not in metadata


def test_provenance_replaces_that_of_an_earlier_transfer():
    own = {key: value for key, value in moved().items() if key.startswith("prolora.")}
    assert own == {"prolora.source": "old", "prolora.method": "prolora"}


def test_metadata_is_made_for_a_lora_that_had_none():
    metadata = rewrite_metadata({}, target_name="new", target_layout="ssd-1b", provenance={})
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["ss_training_comment"] == "moved from another base model to new by prolora"


@pytest.mark.parametrize(("rank", "text"), [(4, "4"), ([4, 2], "Dynamic")])
def test_rank_and_alpha_in_the_header_are_those_of_the_new_file(tmp_path, rank, text):
    adapter = adapter_of(LINEAR, rank, metadata=KOHYA)
    adapters.write_adapter(adapter, tmp_path / "out")
    metadata = adapters.read_adapter(tmp_path / "out").metadata
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (text, text)
    assert metadata["ss_tag_frequency"] == KOHYA["ss_tag_frequency"]


@pytest.mark.parametrize("format", ["kohya", "comfy", "diffusers", "peft"])
@pytest.mark.parametrize("had_rank", [True, False])
def test_a_rank_is_stated_in_kohya_files_and_where_there_was_one(tmp_path, format, had_rank):
    """A1111 and managers show it; a header that had none gets one in the format that has it."""
    metadata = {"ss_network_dim": "99"} if had_rank else {}
    out = tmp_path / "out"
    adapters.write_adapter(adapter_of(LINEAR, 4, metadata=metadata), out, format=format)
    found = adapters.read_adapter(out).metadata
    stated = "4" if had_rank or format == "kohya" else None
    assert (found.get("ss_network_dim"), found.get("ss_network_alpha")) == (stated, stated)


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft", "comfy"])
def test_no_file_carries_a_hash_of_the_file_that_it_was_made_of(tmp_path, format):
    adapters.write_adapter(adapter_of(LINEAR, metadata=KOHYA), tmp_path / "out", format=format)
    metadata = adapters.read_adapter(tmp_path / "out").metadata
    assert not {"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"} & metadata.keys()


def test_a_stale_configuration_is_replaced(tmp_path):
    stale = {"lora_adapter_metadata": json.dumps({"unet.r": 99, "unet.lora_alpha": 1})}
    for rank in (4, [4, 2]):
        adapter = adapter_of(LINEAR, rank, metadata=stale)
        adapters.write_adapter(adapter, tmp_path / "out", format="diffusers", overwrite=True)
        assert "99" not in adapters.read_adapter(tmp_path / "out").metadata.get(
            "lora_adapter_metadata", ""
        )


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


def test_a_manager_finds_what_the_specification_requires():
    metadata = moved()
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.title"] == "my cat"
    for layout, kept in (("sd15", True), ("sdxl", False)):
        given = KOHYA | {"modelspec.prediction_type": "v", "modelspec.date": "2024-01-01"}
        result = rewrite_metadata(given, target_name="new", target_layout=layout, provenance={})
        assert ("modelspec.prediction_type" in result) is kept
        assert result["modelspec.date"] == "2024-01-01"
    assert not [key for key in moved() if key == "modelspec.date"]  # same call, same bits
