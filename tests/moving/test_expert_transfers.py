"""LoRAs between models of two experts: each result is for one of them, and its name says so."""

import pytest
from experts import expert, write_file, write_lora, write_pipeline
from lora_files import read_header, same_bits

import prolora


@pytest.fixture
def target(tmp_path):
    return write_pipeline(tmp_path / "wan22", drift=0.05)


def test_one_lora_becomes_a_file_for_each_expert(tmp_path, target):
    lora = write_lora(tmp_path / "style.safetensors")
    source = write_file(tmp_path / "wan21.safetensors", expert(1))
    outcomes = prolora.transfer_many([lora], source, target, tmp_path / "out", method="prolora")
    assert [(outcome.out.name, outcome.status) for outcome in outcomes] == [
        ("style_high_noise.safetensors", "moved"),
        ("style_low_noise.safetensors", "moved"),
    ]
    for outcome, part in zip(outcomes, ("transformer", "transformer_2"), strict=True):
        alone = tmp_path / "alone.safetensors"
        prolora.transfer(lora, source, target / part, out=alone, method="prolora", overwrite=True)
        assert same_bits(alone, outcome.out)
        assert read_header(outcome.out)["prolora.target"] == f"wan22/{part}"


def test_a_pair_of_loras_goes_from_each_expert_to_the_same_one(tmp_path, target):
    source = write_pipeline(tmp_path / "older")
    high = write_lora(tmp_path / "style_high_noise.safetensors", 1)
    low = write_lora(tmp_path / "style_low_noise.safetensors", 2)
    outcomes = prolora.transfer_many([low, high], source, target, tmp_path / "out", method="copy")
    assert [outcome.out.name for outcome in outcomes] == [low.name, high.name]
    parts = ("transformer_2", "transformer")
    for outcome, lora, part in zip(outcomes, (low, high), parts, strict=True):
        metadata = read_header(outcome.out)
        assert metadata["prolora.source"] == f"older/{part}"
        assert metadata["prolora.target"] == f"wan22/{part}"
        assert same_bits(lora, outcome.out)


def test_results_that_would_be_one_file_are_refused(tmp_path, target):
    one = write_lora(tmp_path / "style.safetensors")
    two = write_lora(tmp_path / "style_low_noise.safetensors")
    source = write_file(tmp_path / "wan21.safetensors", expert(1))
    with pytest.raises(prolora.errors.OutputError, match="two inputs would become style_low_noise"):
        prolora.transfer_many([one, two], source, target, tmp_path / "out")


def test_a_folder_of_two_experts_is_no_target_of_one_file(tmp_path, target):
    lora = write_lora(tmp_path / "style.safetensors")
    source = write_file(tmp_path / "wan21.safetensors", expert(1))
    with pytest.raises(prolora.errors.UnsupportedFormat, match="has two experts"):
        prolora.transfer(lora, source, target, out=tmp_path / "out.safetensors")
