"""Uploading moved LoRAs: what goes onto the hub, and what is refused before anything is sent."""

import sys
from types import SimpleNamespace

import pytest
from mini import lora_tensors, write_case
from safetensors.torch import save_file
from typer.testing import CliRunner

from prolora import InvalidOption, OutputError, UnsupportedFormat
from prolora.cli.app import app
from prolora.workflow.push import push

ADDRESS = "https://huggingface.co/me/loras/commit/1"


class Api:
    """As much of `huggingface_hub.HfApi` as `push` uses."""

    made, commits, error = [], [], None

    def __init__(self, library_name):
        assert library_name == "prolora"

    def create_repo(self, repo, private, exist_ok):
        assert exist_ok
        if Api.error:
            raise Api.error
        Api.made.append((repo, private))

    def create_commit(self, repo, operations, commit_message):
        Api.commits.append(([o.path_in_repo for o in operations], commit_message))
        return SimpleNamespace(commit_url=ADDRESS)


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    Api.made, Api.commits, Api.error = [], [], None
    client = SimpleNamespace(HfApi=Api, CommitOperationAdd=lambda **known: SimpleNamespace(**known))
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)


@pytest.fixture
def moved(tmp_path):
    """A folder with a moved LoRA, its report page and its card."""
    lora, source, target = write_case(tmp_path)
    out = tmp_path / "out" / "style.safetensors"
    out.parent.mkdir()
    words = ["transfer", lora, "--source", source, "--target", target, "-o", out, "--card"]
    words += ["--report", out.with_suffix(".html"), "--method", "copy", "--quiet"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return out


def test_the_lora_its_card_and_its_report_go_up_in_one_commit(moved):
    (moved.parent / "notes.txt").write_text("private")
    result = CliRunner().invoke(app, ["push", str(moved), "me/loras"])
    assert result.exit_code == 0 and f"uploaded to {ADDRESS}" in " ".join(result.output.split())
    assert Api.made == [("me/loras", True)]
    ((files, message),) = Api.commits
    assert files == ["README.md", "style.safetensors", "style.html"]
    assert message == "style.safetensors, moved by prolora"


def test_a_folder_goes_up_whole_and_public_where_that_is_asked_for(moved):
    assert push(moved.parent, "me/loras", private=False, message="hello") == ADDRESS
    assert Api.made == [("me/loras", False)] and Api.commits[0][1] == "hello"


def test_what_prolora_did_not_move_is_not_uploaded(moved):
    save_file(lora_tensors(), moved.parent / "other.safetensors")
    with pytest.raises(OutputError, match=r"other\.safetensors: was not written by prolora"):
        push(moved.parent, "me/loras")
    assert not Api.made


def test_without_a_card_nothing_is_uploaded(moved):
    (moved.parent / "README.md").write_text("# mine")
    with pytest.raises(OutputError, match="no model card of prolora"):
        push(moved, "me/loras")
    with pytest.raises(OutputError, match=r"no \.safetensors file"):
        push(moved.parent / "nothing", "me/loras")
    assert not Api.made


def test_the_hub_s_refusal_and_a_missing_client_are_errors_of_prolora(moved, monkeypatch):
    with pytest.raises(InvalidOption, match="org/name"):
        push(moved, "https://huggingface.co/me/loras")
    Api.error = PermissionError("401 Unauthorized")
    with pytest.raises(UnsupportedFormat, match="401 Unauthorized"):
        push(moved, "me/loras")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UnsupportedFormat, match=r"prolora\[hub\]"):
        push(moved, "me/loras")
