"""What goes wrong ends in one message and an exit code, before work is done where it can."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from prolora import cli
from prolora.errors import input_error, output_error

LONG = "x" * 300


@pytest.mark.parametrize(
    "words",
    [
        f"check {LONG}",
        f"transfer {LONG} --source source --target target -o o.safetensors",
        f"transfer lora.safetensors --source {LONG} --target target -o o.safetensors",
        f"transfer lora.safetensors --source source --target target -o {LONG}.safetensors",
        f"check lora.safetensors --base {LONG}",
        f"demo -o {LONG}",
    ],
)
def test_a_name_that_is_too_long_is_no_traceback(prolora, case, monkeypatch, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    code, _, text = prolora(*words.split())
    assert code in (1, 2) and "xxx" in text and "too long" in text
    assert len(text.splitlines()) == 1


def failed_disk(number=errno.ENOSPC, text="No space left on device"):
    error = output_error("x", OSError(number, text))
    error.__cause__ = OSError(number, text)
    return error


@pytest.mark.parametrize(
    "error, code, said",
    [
        (PermissionError(errno.EACCES, "Permission denied", "/home/x"), 1, "/home/x: Permission"),
        (OSError(errno.EIO, "Input/output error"), 1, "Input/output error"),
        (MemoryError(), 1, "no more memory"),
        (RuntimeError("CUDA out of memory. Tried"), 1, "--device cpu"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "Tried to allocate"),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates"), 1, "surrogates"),
        (RuntimeError("no usable CUDA device (none)"), 2, "no usable CUDA device"),
        (ValueError("rank must be"), 2, "rank must be"),
        (failed_disk(), 1, "No space left"),
        (failed_disk(errno.EFBIG, "File too large"), 1, "File too large"),
        (failed_disk(errno.EROFS, "Read-only file system"), 1, "Read-only file system"),
        (failed_disk(errno.EDQUOT, "Quota"), 1, "Quota"),
    ],
)
def test_every_error_of_the_system_is_one_line(prolora, monkeypatch, error, code, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("prolora.cli.check.CheckRequest.check", fail)
    found, out, err = prolora("check", "x")
    assert found == code and said in err and not out and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("number", "winerror", "said"),
    [
        (errno.EACCES, 32, "close the program that has it open, such as ComfyUI, or change"),
        (errno.EINVAL, 123, "no such file; no name matches this pattern"),
        (errno.ENOENT, 3, "this path is too long: Windows opens 259 letters"),
    ],
)
def test_errors_of_windows_name_the_way_out(monkeypatch, number, winerror, said):
    path = {123: r"C:\loras\*.safetensors", 32: "C:/a", 3: "C:/" + "long/" * 60}[winerror]
    error = OSError(number, "refused", path)
    error.winerror = winerror
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        of_input, of_output = str(input_error(path, error)), str(output_error(path, error))
    assert said in of_input and (winerror == 123 or said in of_output)


def test_a_folder_that_must_not_be_read_is_no_traceback(prolora, case, tmp_path, monkeypatch):
    _, source, _ = case
    scandir = os.scandir

    def refuse(path="."):
        if str(path).startswith(str(source)):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    def refuse_open(*words, **more):
        raise PermissionError(errno.EACCES, "Permission denied", str(words[0]))

    monkeypatch.setattr("os.scandir", refuse)
    monkeypatch.setattr("os.listdir", refuse)
    monkeypatch.setattr("builtins.open", refuse_open)
    code, _, text = prolora("check", source)
    assert code in (1, 2) and "Permission denied" in text


def test_torch_without_memory_is_no_traceback(prolora, monkeypatch):
    def fail(*_, **__):
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr("prolora.cli.check.CheckRequest.check", fail)
    code, _, text = prolora("check", "x")
    assert code == 1 and text.startswith("Error: the system gave no more memory")


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(*_, **__):
        raise KeyError("a bug")

    monkeypatch.setattr("prolora.cli.check.CheckRequest.check", fail)
    monkeypatch.setattr("sys.argv", ["prolora", "check", "x"])
    with pytest.raises(KeyError):
        cli.main()


def test_an_interrupted_command_says_so_by_its_exit_code(prolora, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("prolora.cli.check.CheckRequest.check", interrupt)
    code, _, text = prolora("check", "x")
    assert code == 130 and text.strip().startswith("Stopped; nothing was written")


def test_what_is_left_of_an_update_whose_name_was_damaged_is_no_success(prolora, case, tmp_path):
    lora, source, target = case
    tensors = load_file(lora)
    name = next(key for key in tensors if key.endswith(".alpha"))
    tensors[name.replace("attn1", "attn9")] = tensors.pop(name)
    save_file(tensors, tmp_path / "damaged.safetensors")
    line = ("transfer", tmp_path / "damaged.safetensors", "--source", source, "--target", target)
    code, _, errors = prolora(*line, "-o", tmp_path / "out.safetensors")
    assert code == 4 and "attn9" in errors
    (tmp_path / "folder").mkdir()
    for status in ("moved", "already there"):
        code, text, errors = prolora(*line, "-o", tmp_path / "folder", "--json")
        assert code == 4 and "attn9" in errors and json.loads(text)["status"] == status


@pytest.mark.parametrize(
    "words",
    [
        ("transfer", "nope.safetensors", "--source", "SOURCE", "--target", "TARGET", "--dry-run"),
        ("check", "nope.safetensors", "SOURCE"),
        ("merge", "nope.safetensors", "nope.safetensors", "-o", "both.safetensors"),
        ("check", "nope.safetensors"),
        ("convert", "nope.safetensors", "-o", "other.safetensors"),
        ("extract", "nope.safetensors", "SOURCE", "-o", "other.safetensors"),
        ("migrate", "nope", "--source", "SOURCE", "--target", "TARGET", "-o", "moved"),
    ],
    ids=lambda words: words[0],
)
def test_a_program_is_told_why_a_command_failed(prolora, case, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    words = [{"SOURCE": case[1], "TARGET": case[2]}.get(word, word) for word in words]
    code, _, said = prolora(*words)
    assert code == 2 and said.startswith("Error: ")
    assert prolora(*words, "--json")[::2] == (code, said)
    told = json.loads(prolora(*words, "--json")[1])
    assert told.keys() == {"error"} and told["error"].keys() == {"type", "code", "message"}
    assert told["error"]["code"] in ("missing-file", "unsupported-format")
    assert prolora(*words)[1] == ""  # nor does what was asked before stay asked


def test_a_program_is_told_of_a_refusal_once(prolora, line, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "lora.safetensors").write_text("of somebody else")
    code, text, _ = prolora(*line, "-o", moved, "--json")
    assert code == 2 and json.loads(text)["error"]["code"] == "output-exists"
    assert json.loads(text)["status"] == "failed"
    code, text, _ = prolora(*line, "--out-rank", "0", "-o", moved, "--json")
    assert code == 2 and json.loads(text)["error"]["code"] == "invalid-option"


def test_the_report_replaces_no_lora_of_the_run(prolora, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out.safetensors"
    for report in ("out.safetensors", "./out.safetensors", "OUT.safetensors", tmp_path / "lora/.."):
        code, _, text = prolora(*line, "-o", out, "--report", report)
        assert code == 2 and text.startswith("Error: ") and not out.exists(), report
    (tmp_path / "moved").mkdir()
    for report in ("moved/lora.safetensors", "moved/../moved/LORA.safetensors"):
        code, _, text = prolora(*line, "-o", "moved", "--report", report)
        assert code == 2 and "would replace the LoRA" in text
        assert not list((tmp_path / "moved").iterdir())
    (tmp_path / "peft").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        code, _, _ = prolora(*line, "-o", "peft", "--format", "peft", "--report", f"peft/{name}")
        assert code == 2 and not list((tmp_path / "peft").iterdir())


def test_the_report_replaces_no_link_to_the_lora(prolora, line, tmp_path):
    out, link = tmp_path / "out.safetensors", tmp_path / "link.json"
    link.symlink_to(out)
    code, _, text = prolora(*line, "-o", out, "--report", link)
    assert code == 2 and "would replace the LoRA" in text and not out.exists()


@pytest.mark.parametrize("name", ["report.json", "report.html"])
def test_a_run_that_was_killed_once_all_was_written_ends_well_with_its_own_report(
    prolora, line, tmp_path, name
):
    report = tmp_path / name
    whole = [*line, "-o", tmp_path / "out.safetensors", "--report", report]
    assert prolora(*whole)[0] == 0
    written = report.read_bytes()
    assert prolora(*whole)[0] == 0
    assert report.read_bytes() == written  # the run that keeps a result has no numbers
    report.write_text("mine")
    code, _, text = prolora(*whole)
    assert code == 2 and "exists" in text and report.read_text() == "mine"
