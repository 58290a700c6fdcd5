"""Deeper targets on the command line: what is said of their blocks, and the map as a file."""

import json

import anima_depth
import pytest
import torch
from safetensors.torch import load_file, save_file

Q = "transformer_blocks.{}.attn1.to_q"


@pytest.fixture(scope="module")
def deeper(tmp_path_factory):
    """A LoRA, its base of 28 blocks, and one of 40 that are copies and old ones in turn."""
    folder = tmp_path_factory.mktemp("deeper")
    source, target, _ = anima_depth.make_pair("zeroed copy", 0.05, "noise", 0, narrower=64)
    for name, weights in (("source", source), ("target", target)):
        path = folder / f"{name}.safetensors"
        save_file({f"{module}.weight": w.contiguous() for module, w in weights.items()}, path)
    lora = {}
    for number in range(28):
        rows, columns = source[Q.format(number)].shape
        lora[f"transformer.{Q.format(number)}.lora_A.weight"] = torch.full((1, columns), 0.1)
        lora[f"transformer.{Q.format(number)}.lora_B.weight"] = torch.full((rows, 1), number + 1.0)
    save_file(lora, folder / "lora.safetensors")
    return folder


def command(deeper, name, *words):
    bases = ("--source", deeper / "source.safetensors", "--target", deeper / "target.safetensors")
    loras = [deeper / "lora.safetensors"] if name == "transfer" else []
    return (name, *loras, *bases, *words)


def find_blocks(path):
    return sorted(
        {int(key.split("transformer_blocks.")[1].split(".")[0]) for key in load_file(path)}
    )


def test_a_lora_of_28_blocks_lands_on_those_40_that_were_there_before(prolora, deeper, tmp_path):
    out, saved = tmp_path / "out.safetensors", tmp_path / "map.json"
    assert prolora(*command(deeper, "advise", "--cache=none", "--save-match", saved))[0] == 0
    how = ("--method", "copy", "--strength", "1", "--cache=none", "--explain")
    code, text, _ = prolora(*command(deeper, "transfer", *how, "-o", out))
    assert code == 0 and "0←0 1←1 2←none 3←2" in " ".join(text.split())
    old = [i for i in range(40) if i not in anima_depth.INSERTED]
    assert find_blocks(out) == old
    table = json.loads(saved.read_text())
    assert {t: s for t, s in table.items() if t.endswith("attn1.to_q")} == {
        Q.format(j): Q.format(i) for i, j in enumerate(old)
    }
    again = tmp_path / "again.safetensors"
    how = ("--match", saved, "--method", "copy", "--strength", "1", "--cache=none")
    assert prolora(*command(deeper, "transfer", *how, "-o", again))[0] == 0
    first, second = load_file(out), load_file(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_advice_says_what_the_other_blocks_are_and_saves_the_map(prolora, deeper, tmp_path):
    saved = tmp_path / "map.json"
    how = ("--match", "similarity", "--cache=none", "--save-match", saved, "--explain")
    code, text, _ = prolora(*command(deeper, "advise", *how))
    text = " ".join(text.split())
    assert code == 0 and "28 of 40 blocks of the target were recognised" in text
    assert "12 of the others resemble a block that feeds another one" in text
    assert len(json.loads(saved.read_text())) == 28 * 16 + 1  # and the mark
    code, text, _ = prolora(*command(deeper, "advise", "--match", saved, "--cache=none", "--json"))
    assert code == 0 and json.loads(text)["match"] == "the map map.json"


def test_a_map_replaces_nothing_but_a_map(prolora, deeper, tmp_path):
    line = ("--match", "similarity", "--cache=none", "--save-match")
    other = tmp_path / "x.json"
    other.write_text('{"a": 1}')
    for path in (other, deeper / "source.safetensors", other / "map.json"):
        code, _, error = prolora(*command(deeper, "advise", *line, path))
        assert code == 2 and path.name in " ".join(error.split()).replace(" ", "")
    assert other.read_text() == '{"a": 1}'
