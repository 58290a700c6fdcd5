"""State dicts that torch saved: what is read, and what is refused without running anything."""

from __future__ import annotations

import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from fresh import run_here

from prolora import UnsupportedFormat, open_base
from prolora.adapters import read_adapter
from prolora.files import pickle_file
from prolora.files.pickle_file import PickleFile

WEIGHTS = {
    "input_blocks.1.0.in_layers.2.weight": torch.arange(36.0).reshape(2, 2, 3, 3),
    "out.2.weight": torch.ones(1, 2, 3, 3, dtype=torch.float16),
    "time_embed.0.weight": torch.arange(8.0).reshape(4, 2).mT,  # not contiguous
}


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.ckpt"])
@pytest.mark.parametrize("nested", [None, "state_dict", "model", "ema"])
def test_the_weights_of_a_state_dict_are_read_as_they_were_saved(tmp_path, name, nested):
    path = tmp_path / name
    torch.save(WEIGHTS if nested is None else {nested: WEIGHTS, "step": 3}, path)
    file = PickleFile(path)
    assert {key: info.shape for key, info in file.tensors.items()} == {
        key: tuple(value.shape) for key, value in WEIGHTS.items()
    }
    for key, value in WEIGHTS.items():
        read = file.read(key)
        assert read.dtype == value.dtype and read.is_contiguous() and torch.equal(read, value)
        assert torch.equal(file.read_rows(key, 1, len(value)), value[1:])
    assert set(open_base(path).shapes) == {key.removesuffix(".weight") for key in WEIGHTS}


def test_of_several_state_dicts_in_a_folder_none_is_chosen(tmp_path):
    torch.save(WEIGHTS, tmp_path / "model.pt")
    assert len(open_base(tmp_path).shapes) == len(WEIGHTS)
    torch.save(WEIGHTS, tmp_path / "model_ema.pt")
    with pytest.raises(UnsupportedFormat, match=r"several checkpoints \(model.pt, model_ema.pt\)"):
        open_base(tmp_path)


def test_what_is_read_can_be_written_into_without_changing_the_file(tmp_path):
    torch.save(WEIGHTS, tmp_path / "model.pt")
    file = PickleFile(tmp_path / "model.pt")
    file.read("out.2.weight").zero_()
    assert torch.equal(file.read("out.2.weight"), WEIGHTS["out.2.weight"])


def test_a_lora_in_a_state_dict_is_read(tmp_path):
    factors = {
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(2, 4),
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(4, 2),
        "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(1.0),
    }
    torch.save(factors, tmp_path / "lora.pt")
    update = read_adapter(tmp_path / "lora.pt").updates["mid_block.attentions.0.proj_in"]
    assert torch.equal(update.dense(), torch.ones(4, 4))


class Runs:
    """What makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save(WEIGHTS | {"config": Runs(tmp_path / "ran")}, tmp_path / "model.pt")
    with pytest.raises(UnsupportedFormat, match=r"model\.pt: holds objects beside its tensors"):
        open_base(tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists()


def test_the_old_format_is_told_with_the_command_that_converts_it(tmp_path):
    torch.save(WEIGHTS, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    for read in (PickleFile, open_base):
        with pytest.raises(UnsupportedFormat, match="old format") as caught:
            read(tmp_path / "model.pt")
        assert "damaged" not in str(caught.value)
    run_here(caught.value.command)
    assert set(open_base(tmp_path / "model.safetensors").shapes) == set(open_base(WEIGHTS).shapes)


def test_a_torch_whose_safe_reading_has_a_known_hole_reads_no_pickle(tmp_path, monkeypatch):
    torch.save(WEIGHTS, tmp_path / "model.pt")
    monkeypatch.setattr(pickle_file.torch, "__version__", "2.5.1+cpu")
    with pytest.raises(UnsupportedFormat, match="Convert it once"):
        open_base(tmp_path / "model.pt")


def test_several_sets_of_weights_are_not_chosen_from(tmp_path):
    torch.save({"model": WEIGHTS, "ema": WEIGHTS}, tmp_path / "model.pt")
    with pytest.raises(UnsupportedFormat, match=r"several sets of weights \(model, ema\)"):
        open_base(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("saved", "named"),
    [
        ([torch.ones(2, 2)], "holds a list"),
        ({"step": 3}, "no tensors by name"),
        ({"a.weight": torch.ones(1).expand(10_000, 10_000)}, "a.weight holds no numbers"),
        ({"a.weight": torch.ones(2, 2).to_sparse()}, "a.weight holds no numbers"),
        ({"a.weight": torch.ones(2, 2, device="meta")}, "a.weight holds no numbers"),
    ],
)
def test_what_is_no_state_dict_of_plain_tensors_is_refused(tmp_path, saved, named):
    torch.save(saved, tmp_path / "model.pt")
    with pytest.raises(UnsupportedFormat, match=named):
        PickleFile(tmp_path / "model.pt")


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (1 << 24))
    with pytest.raises(UnsupportedFormat, match="is not a file as torch"):
        open_base(path)


def test_a_checkpoint_cut_off_or_changed_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(WEIGHTS, path)
    file = PickleFile(path)
    whole = path.read_bytes()
    torch.save(WEIGHTS, path.with_name("other.pt"))
    path.with_name("other.pt").replace(path)
    with pytest.raises(UnsupportedFormat, match="was changed while it was in use"):
        file.read("out.2.weight")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnsupportedFormat, match="model"):
        open_base(path)


def test_damaged_bytes_never_escape_as_another_error(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(WEIGHTS, path)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(len(whole), (150,), generator=generator).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            file = PickleFile(path)
            for key in file.tensors:
                file.read(key)
        except UnsupportedFormat as error:
            assert "model.pt" in str(error)


def test_a_pickle_that_takes_from_an_empty_stack_is_damaged(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(WEIGHTS, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, b"\x80\x02a." if name.endswith(".pkl") else content)
    with pytest.raises(UnsupportedFormat, match=r"model\.pt: is damaged"):
        open_base(path)


def test_a_plain_pickle_is_no_archive(tmp_path):
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UnsupportedFormat, match="a pickle checkpoint"):
        open_base(tmp_path / "model.pt")


def test_a_file_that_is_cut_while_it_is_read_does_not_end_the_process(tmp_path):
    torch.save({"w.weight": torch.ones(1000, 1000)}, tmp_path / "model.pt")
    code = """
import os, sys
from prolora import UnsupportedFormat
from prolora.files import pickle_file, safetensors_file
file, check = pickle_file.PickleFile(sys.argv[1]), safetensors_file.check_unchanged
def check_and_cut(*words):
    check(*words)
    os.truncate(sys.argv[1], 8192)
safetensors_file.check_unchanged = check_and_cut
try:
    file.read("w.weight")
except UnsupportedFormat as error:
    print(error)
"""
    words = [sys.executable, "-c", code, tmp_path / "model.pt"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "ends inside w.weight; run again" in done.stdout


def test_tensors_that_share_their_numbers_in_any_order_are_read_as_torch_reads_them(tmp_path):
    whole = torch.arange(60.0).reshape(6, 10)
    saved = {
        "whole": whole,
        "rows": whole[2:4],
        "columns": whole[:, 3:8:2],
        "turned": whole.mT,
        "many": whole[1].expand(4, 10),
        "bits": torch.tensor([True, False, True]),
        "none": torch.empty(0, 3),
        "one": torch.tensor(7, dtype=torch.int64),
        "half": torch.randn(5, 3).bfloat16(),
        "byte": torch.randn(4, 4).to(torch.float8_e4m3fn),
    }
    for kept in (saved, dict(reversed(saved.items())), {"state_dict": saved, "x": torch.ones(9)}):
        torch.save(kept, tmp_path / "model.pt")
        file = PickleFile(tmp_path / "model.pt")
        assert {name: info.shape for name, info in file.tensors.items()} == {
            name: tuple(tensor.shape) for name, tensor in kept.get("state_dict", kept).items()
        }
        for name, tensor in saved.items():
            read = file.read(name)
            assert read.dtype == tensor.dtype and read.is_contiguous()
            assert torch.equal(read.float(), tensor.float()), name
            if tensor.dim():
                some = file.read_rows(name, min(1, len(tensor)), len(tensor))
                assert torch.equal(some.float(), tensor[1:].float()), name


def test_numbers_of_the_other_byte_order_are_refused(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(WEIGHTS, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, b"big" if name.endswith("byteorder") else content)
    with pytest.raises(UnsupportedFormat, match="not a file as torch"):
        PickleFile(path)
