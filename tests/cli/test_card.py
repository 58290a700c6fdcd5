"""The model card: what the Hub reads in it, whose words are in it, and what it replaces."""

import hashlib

import pytest
from mini import lora_tensors
from safetensors.torch import save_file

HEADER = {
    "modelspec.trigger_phrase": 'my "cat": [x]\n---\n<script>',
    "modelspec.license": "apache-2.0",
    "modelspec.tags": "style, ink",
}


@pytest.fixture
def line(line):
    save_file(lora_tensors(), line[1], HEADER)
    return *line, "--card"


def read_card(path):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    return hub.ModelCard.load(path)


def test_the_hub_reads_the_card(prolora, line, tmp_path):
    out = tmp_path / "moved.safetensors"
    assert prolora(*line, "-o", out)[0] == 0
    read = read_card(tmp_path / "README.md")
    data = read.data.to_dict()
    assert data["base_model"] == ["target", "source"]
    assert data["base_model_relation"] == "adapter" and data["library_name"] == "diffusers"
    assert data["tags"][:2] == ["lora", "prolora"] and {"style", "ink"} <= set(data["tags"])
    assert data["license"] == "apache-2.0"
    assert data["instance_prompt"] == HEADER["modelspec.trigger_phrase"]
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    for text in (digest, "Most of the LoRA", "Licence: apache-2.0"):
        assert text in read.text
    assert 'my "cat": \\[x\\] --- \\<script\\>' in read.text
    assert str(tmp_path) not in read.content


def test_nothing_else_of_a_header_stands_in_the_card(prolora, line, tmp_path):
    told = {"ss_output_name": "me@home", "ss_dataset_dirs": "/home/me/x", "modelspec.author": "me"}
    save_file(lora_tensors(), line[1], HEADER | told | {"prolora.note": "mine"})
    assert prolora(*line, "-o", tmp_path / "moved.safetensors")[0] == 0
    text = read_card(tmp_path / "README.md").content
    assert not [word for word in ("home", "author", "mine") if word in text]
    assert set(read_card(tmp_path / "README.md").data.to_dict()) == {
        *("base_model", "base_model_relation", "library_name", "tags", "license"),
        "instance_prompt",
    }


def test_several_loras_have_one_card_in_their_folder(prolora, line, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file(lora_tensors(), other, {"modelspec.license": "Our own terms: ask"})
    assert prolora(*line, other, "-o", tmp_path / "moved")[0] == 0
    read = read_card(tmp_path / "moved" / "README.md")
    assert read.data.base_model == ["target", "source"]
    # Each has its own licence and words, so the card as a whole has none.
    assert read.data.license is None and "instance_prompt" not in read.data.to_dict()
    assert [row for row in read.text.splitlines() if row.startswith("## ")] == [
        "## lora.safetensors",
        "## other.safetensors",
    ]
    assert "Licence: Our own terms: ask" in read.text
    # Where nothing is new there is no card; what was there already is in one.
    file, again = tmp_path / "moved" / "README.md", (*line, other, "-o", tmp_path / "moved")
    assert prolora(*again)[0] == 2  # for the card's sake
    file.unlink()
    assert prolora(*again)[0] == 0 and not file.exists()
    (tmp_path / "moved" / "other.safetensors").unlink()
    assert prolora(*again)[0] == 0
    text = read_card(file).text
    assert text.count("## ") == 2 and text.count("Moved in an earlier run") == 1


def test_the_card_of_a_peft_folder_lies_in_it(prolora, line, tmp_path):
    for more in ((), ("--overwrite",)):
        assert prolora(*line, "-o", tmp_path / "peft", "--format", "peft", *more)[0] == 0
        assert read_card(tmp_path / "peft" / "README.md").data.library_name == "peft"
    assert not (tmp_path / "README.md").exists()
