"""`prolora check`: a line a LoRA, and an exit code that says whether all fit."""

import json

import pytest
import torch
from odd_files import ODD_FILES
from safetensors.torch import load_file, save_file

from prolora import Base


@pytest.fixture
def files(case, tmp_path):
    """A LoRA that fits, one of which a module has no place, and their base."""
    lora, source, _ = case
    tensors = load_file(lora)
    names = {k: k.replace("transformer_blocks_0", "transformer_blocks_9") for k in tensors}
    deep = {names[k]: v.clone() for k, v in tensors.items()}
    other = tmp_path / "deep.safetensors"
    save_file(tensors | deep, other)
    return lora, other, source


def test_a_lora_that_fits_ends_in_0_and_a_line(prolora, files):
    lora, _, base = files
    code, out, err = prolora("check", lora, base)
    assert (code, err) == (0, "") and out.startswith("✔ for this base, by names and shapes: ")
    assert prolora("check", lora, "--base", base) == (code, out, err)


def test_a_file_alone_is_said_to_be_what_it_is(prolora, files):
    lora, _, base = files
    code, out, _ = prolora("check", lora)
    assert code == 3 and out.startswith("⚠ a LoRA for a model of no known family")
    assert "rank 4" in out and "kohya" in out
    code, out, _ = prolora("check", base)
    assert code == 0 and "base model" in out and "files are as asked" not in out
    code, out, _ = prolora("check", lora, "--for", "forge", "--json")
    assert code in (0, 3) and json.loads(out)["program"] == "Forge"
    assert json.loads(prolora("check", lora, "--for", "Forge", "--json")[1]) == json.loads(out)


def test_a_lora_that_fits_in_part_ends_in_3(prolora, files):
    _, other, base = files
    code, out, _ = prolora("check", other, base)
    assert code == 3 and "⚠ in part for this base" in out


def test_of_several_each_has_its_line_and_the_worst_decides_the_code(prolora, files, tmp_path):
    lora, other, base = files
    code, out, _ = prolora("check", lora, other, base)
    assert code == 3 and f"{lora.name}: ✔" in out and f"{other.name}: ⚠" in out
    assert out.endswith("1 of 2 files are as asked\n")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    code, out, _ = prolora("check", lora, tmp_path / "bad.safetensors", other, base)
    assert code == 2 and f"{other.name}: ⚠" in out and out.count("bad.safetensors: ") == 1


@pytest.mark.parametrize(
    ("field", "names", "said"),
    [
        ("ss_sd_model_name", ("pony.safetensors", "pony-fp16"), ""),
        ("ss_sd_model_name", ("pony.ckpt", "noob"), "a.safetensors on pony"),
        ("ss_base_model_version", ("wan_2.2_14b", "wan"), "a.safetensors on Wan 2.2"),
        ("prolora.target", ("noob", ""), "a.safetensors was moved to noob, and b"),
    ],
)
def test_loras_of_different_bases_are_named_after_the_last_line(
    prolora, tmp_path, field, names, said
):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, name in zip(paths, names, strict=True):
        shapes = {"up": (320, 4), "down": (4, 320)}
        key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_{}.weight"
        tensors = {key.format(x): torch.ones(size) for x, size in shapes.items()}
        save_file(tensors, path, {field: name})
    last = prolora("check", *paths)[1].partition("files are as asked\n")[2]
    assert said in last and bool(said) == bool(last)
    merged = prolora("merge", *paths, "-o", tmp_path / "both.safetensors")[1]
    assert (said.replace(".safetensors", "") in " ".join(merged.split())) or not said


def test_help_says_what_the_exit_codes_mean(prolora):
    _, out, _ = prolora("check", "-h")
    assert "3 a LoRA is not for the base or program, or in part" in " ".join(out.split())


def test_a_base_among_the_loras_is_no_lora(prolora, files):
    lora, _, base = files
    code, out, _ = prolora("check", base, lora, "--base", base)
    assert code == 2 and "✖ a whole model; compare a LoRA" in out and f"{lora.name}: ✔" in out
    assert "1 of 2 files are as asked" in out


@pytest.mark.parametrize("odd", ODD_FILES, ids=lambda odd: odd.name)
def test_the_terminal_says_of_an_odd_file_what_the_table_has(prolora, odd, tmp_path):
    asked = ["--deep"] if odd.asked.get("deep") else []
    asked += ["--for", odd.asked["program"]] if "program" in odd.asked else []
    path = odd.write(tmp_path)
    code, out, err = prolora("check", path, *asked)
    start = f"Error: {path}: " if err else f"{odd.mark} "  # nothing is read of it
    assert code == odd.code and not (out and err)
    assert " ".join((out or err).split()).startswith(f"{start}{odd.first}".rstrip())


def test_one_odd_file_keeps_no_other_from_being_checked(prolora, tmp_path):
    paths = [odd.write(tmp_path) for odd in ODD_FILES if not odd.asked]
    code, out, err = prolora("check", *paths)
    assert code == 2 and not err
    for odd in ODD_FILES:
        line = f"{odd.name}.safetensors: {odd.mark} {odd.first}".rstrip()
        assert odd.asked or line in " ".join(out.split()), odd.name
    right = sum(odd.mark == "✔" for odd in ODD_FILES)
    assert f"{right} of {len(paths)} files are as asked" in out


def test_the_bases_of_many_loras_are_opened_and_read_once(prolora, case, tmp_path, monkeypatch):
    """They were for each of them: minutes for a folder of LoRAs and a model of gigabytes."""
    lora, source, target = case
    save_file(dict([*load_file(lora).items()][:9]), tmp_path / "few.safetensors")
    loras, work = [lora, tmp_path / "few.safetensors"], []
    make, read = Base.__init__, Base.read

    def note(kind, call):
        return lambda *words, **more: (work.append(kind), call(*words, **more))[1]

    for bases in (["--base", source], ["--source", source, "--target", target]):
        monkeypatch.setattr(Base, "__init__", make)
        monkeypatch.setattr(Base, "read", read)
        alone = [json.loads(prolora("check", one, *bases, "--json")[1]) for one in loras]
        monkeypatch.setattr(Base, "__init__", note("open", make))
        monkeypatch.setattr(Base, "read", note("read", read))
        prolora("check", lora, *bases)
        once = work.copy()
        work.clear()
        assert json.loads(prolora("check", *loras, *bases, "--json")[1]) == alone
        assert work == once and "open" in work
        work.clear()
