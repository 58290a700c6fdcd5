"""Uploading moved LoRAs: what goes onto the hub, and what is refused before anything is sent."""

import hashlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mini import lora_tensors, write_case
from safetensors.torch import load, load_file, save_file
from typer.testing import CliRunner

from prolora import InvalidOption, OutputError, UnsupportedFormat
from prolora.adapters.formats.metadata import compute_hashes
from prolora.cli.app import app
from prolora.files.ownership import is_own
from prolora.files.safetensors_file import SafetensorsFile
from prolora.workflow.inspection import inspect
from prolora.workflow.publication import drop_folders, find_private
from prolora.workflow.push import push

ADDRESS = "https://huggingface.co/me/loras/commit/1"


class Api:
    """As much of `huggingface_hub.HfApi` as `push` uses."""

    made, commits, error, sent = [], [], None, {}

    def __init__(self, library_name):
        assert library_name == "prolora"

    def create_repo(self, repo, private, exist_ok):
        assert exist_ok
        if Api.error:
            raise Api.error
        Api.made.append((repo, private))

    def create_commit(self, repo, operations, commit_message):
        Api.commits.append(([o.path_in_repo for o in operations], commit_message))
        # As it is read while the call lasts.
        Api.sent = {o.path_in_repo: Path(o.path_or_fileobj).read_bytes() for o in operations}
        return SimpleNamespace(commit_url=ADDRESS)


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    Api.made, Api.commits, Api.error, Api.sent = [], [], None, {}
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
    with pytest.raises(OutputError, match=r"README\.md: no model card that prolora wrote"):
        push(moved, "me/loras")
    with pytest.raises(OutputError, match=r"no \.safetensors file there"):
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


SECRET_HEADER = {
    "ss_tag_frequency": '{"10_my_neighbour": {"trigger": 5}}',
    "ss_dataset_dirs": '{"/home/me/pictures/10_my_neighbour": {"n_repeats": 10}}',
    "ss_training_comment": "for the client",
    "my.key": "mine",
    "ss_sd_model_name": "/home/me/My models/base.safetensors",
    "modelspec.title": "/home/me/loras/title.safetensors",
    "modelspec.author": "Me",
}


@pytest.fixture
def secretive(tmp_path):
    """A moved LoRA whose header says what nobody should read."""
    lora, source, target = write_case(tmp_path)
    save_file(lora_tensors(), lora, SECRET_HEADER)
    out = tmp_path / "out" / "style.safetensors"
    words = ["transfer", lora, "--source", source, "--target", target, "-o", out, "--card"]
    words += ["--report", out.with_suffix(".html"), "--method", "copy", "--quiet"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return out


def test_no_folder_of_this_machine_and_no_private_key_is_sent(secretive, tmp_path):
    push(secretive, "me/loras")
    assert sorted(Api.sent) == ["README.md", "style.html", "style.safetensors"]
    whole = b"".join(Api.sent.values())
    for secret in (str(tmp_path), "/home/me", "My models", "neighbour", "the client", "my.key"):
        assert secret.encode() not in whole, secret
    assert b"title.safetensors" in whole and b"modelspec.author" in whole
    sent, here = load(Api.sent["style.safetensors"]), load_file(secretive)
    assert sent.keys() == here.keys() and all(torch.equal(sent[k], here[k]) for k in here)


def test_what_is_sent_is_whole_and_ours(secretive, tmp_path):
    """The card names the digest of the file that was sent, and both are known again."""
    push(secretive, "me/loras")
    digest = hashlib.sha256(Api.sent["style.safetensors"]).hexdigest()
    assert digest.encode() in Api.sent["README.md"]
    kinds = {"README.md": "card", "style.html": "report", "style.safetensors": "LoRA"}
    for name, kind in kinds.items():
        (tmp_path / name).write_bytes(Api.sent[name])
        assert is_own(tmp_path / name, kind)
    described = inspect(tmp_path / "style.safetensors")
    assert described.moves == inspect(secretive).moves
    # Kohya's hashes are of the header that is sent.
    header = SafetensorsFile(tmp_path / "style.safetensors").metadata
    assert compute_hashes(load(Api.sent["style.safetensors"]), header).items() <= header.items()


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(secretive):
    card = secretive.with_name("README.md")
    card.write_text(card.read_text() + "\nMade in /home/me/pictures by me@example.org\n")
    result = CliRunner().invoke(app, ["push", str(secretive), "me/loras", "--dry-run"])
    assert result.exit_code == 0 and not Api.made and not Api.commits
    lines = result.output.splitlines()
    names = [line.partition(":")[0] for line in lines if not line.startswith(" ")]
    assert names == ["README.md", "style.safetensors", "style.html"]
    assert "  private: /home/me/pictures, me@example.org" in lines
    (removed,) = (line for line in lines if "left out of its header" in line)
    for key in ("ss_tag_frequency", "ss_dataset_dirs", "ss_training_comment", "my.key"):
        assert key in removed
    (sent,) = (line for line in lines if "sent of its header" in line)
    assert "modelspec.author" in sent and "my.key" not in sent


@pytest.mark.parametrize("name", ["style.html", "README.md", "style.safetensors", "z.safetensors"])
def test_a_link_is_not_followed(moved, tmp_path, name):
    secret, file = tmp_path / "secret", moved.parent / name
    if file.exists():
        file.rename(secret)  # so that even what it leads to is ours
    else:
        secret.write_text("root:x:0:0")
    file.symlink_to(secret)
    with pytest.raises(OutputError, match=f"{name}: is a link"):
        push(moved.parent, "me/loras")
    assert not Api.made


def test_a_page_or_a_lora_that_somebody_changed_is_not_sent(moved):
    for name in ("style.html", "style.safetensors"):
        file = moved.with_name(name)
        kept = file.read_bytes()
        for content in (b"my diary", kept[:-1] + bytes([kept[-1] ^ 1])):
            file.write_bytes(content)
            with pytest.raises(ValueError, match=name):
                push(moved.parent, "me/loras")
        file.write_bytes(kept)
    os.link(Path(__file__), moved.with_name("other.html"))
    push(moved.parent, "me/loras")
    assert "other.html" not in Api.sent


@pytest.mark.parametrize(
    "text, found",
    [
        ("/home/me/x.safetensors", "/home/me/x.safetensors"),
        ("in C:\\Users\\me\\x", "C:\\Users\\me\\x"),
        ('"C:\\\\Users\\\\me"', "C:\\\\Users\\\\me"),
        ("~/loras/x and more", "~/loras/x"),
        ("\\\\server\\share\\x", "\\\\server\\share\\x"),
        ("file:///home/me/x", "file:///home/me/x"),
        ("key=/data/loras", "/data/loras"),
        ("me@example.org", "me@example.org"),
        ("https://huggingface.co/me/loras", None),
        ("and/or, 5/8, org/name, models/loras/x", None),
        ("</td><td>", None),
    ],
)
def test_private_strings_are_found_and_others_are_not(text, found):
    assert find_private(text) == (() if found is None else (found,))
    assert found is None or "@" in found or found not in drop_folders(text)
