"""Models by hub id, with a stand-in for the hub: which files are fetched, and which are not."""

import sys
from pathlib import Path

import pytest
from checkpoints import sparse_file, sparse_shards
from mini import write_case

from prolora import cli, open_base
from prolora.errors import UnsupportedFormat
from prolora.files import hub

Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
KEYS = {f"{Q}.weight": (4, 4), "conv_in.weight": (4, 4, 3, 3), "conv_out.weight": (4, 4, 3, 3)}
FULL = "diffusion_pytorch_model.safetensors"


def test_only_the_shards_of_the_model_are_fetched_in_one_variant(cloud):
    """Not the text encoder, not the other variant, not a shard the index does not name."""
    repo = cloud.folder / "org" / "model"
    sparse_shards(repo / "unet", KEYS, 2)
    sparse_file(repo / "unet" / "diffusion_pytorch_model.fp16.safetensors", KEYS)
    sparse_file(repo / "unet" / "diffusion_pytorch_model-00003-of-00003.safetensors", KEYS)
    sparse_file(repo / "text_encoder" / "model.safetensors", KEYS)
    base = open_base("org/model")
    assert set(base.shapes) == {Q, "conv_in", "conv_out"} and base.name == "org/model"
    shards = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert cloud.fetched == [f"unet/{FULL}.index.json", *shards]
    assert cloud.asked is None


@pytest.mark.parametrize(
    ("id_", "files", "wanted"),
    [
        ("org/m", [f"transformer/{FULL}", "flux.safetensors"], f"transformer/{FULL}"),
        ("hf://org/m@v1.0/unet", [f"unet/{FULL}", f"transformer/{FULL}"], f"unet/{FULL}"),
        ("hf://org/m/a/b.safetensors", ["a/b.safetensors", f"unet/{FULL}"], "a/b.safetensors"),
        ("hf://org/m", ["only.safetensors", "README.md"], "only.safetensors"),
        ("org/m@main", [FULL, "other.safetensors"], FULL),
    ],
)
def test_a_file_or_folder_of_a_repository_is_found(cloud, id_, files, wanted):
    for name in files:
        sparse_file(cloud.folder / "org" / "m" / name, KEYS)
    base = open_base(id_)
    assert cloud.fetched == [wanted] and len(base.shapes) == 3
    assert cloud.asked == (id_.partition("@")[2].partition("/")[0] or None)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([f"unet/{FULL}", f"transformer/{FULL}"], "both unet and transformer"),
        (
            [f"transformer/{FULL}", f"transformer_2/{FULL}"],
            "two experts, hf://org/m/transformer for high noise and hf://org/m/transformer_2",
        ),
        (["a.safetensors", "b.safetensors"], r"several checkpoints \(.*name a file as hf://org/m"),
        (["unet/model.bin"], "no weights in unet"),
    ],
)
def test_what_cannot_be_told_apart_is_refused_before_anything_is_fetched(cloud, files, message):
    for name in files:
        sparse_file(cloud.folder / "org" / "m" / name, KEYS)
    with pytest.raises(UnsupportedFormat, match=message):
        open_base("org/m")
    assert not cloud.fetched


def test_offline_only_the_cache_is_looked_at(cloud):
    cloud.constants.HF_HUB_OFFLINE = True
    sparse_shards(cloud.folder / "org" / "m" / "unet", KEYS, 2)
    assert len(open_base("org/m").shapes) == 3 and not cloud.fetched


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for id_ in ("stabilityai/stable-diffusion-xl-base-1.0", "hf://org/m/x.safetensors"):
        with pytest.raises(UnsupportedFormat, match="pip install huggingface_hub,"):
            open_base(id_)


@pytest.mark.parametrize(
    "ids", [("org/one", "org/two@v2"), ("hf://org/one", "hf://org/two@v2/unet")]
)
def test_the_command_line_takes_ids(cloud, ids, tmp_path, monkeypatch, capsys):
    """They reach the hub as they were typed: with both slashes, and not as paths."""
    lora, source, target = write_case(tmp_path)
    for folder, repo in ((source, "one"), (target, "two")):
        (cloud.folder / "org" / repo).mkdir(parents=True)
        folder.rename(cloud.folder / "org" / repo / "unet")
    out, where = tmp_path / "out.safetensors", ["--source", ids[0], "--target", ids[1]]
    for line in (["transfer", str(lora), *where, "-o", str(out)], ["check", str(lora), *where]):
        monkeypatch.setattr("sys.argv", ["prolora", *line])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code and "org/two" in capsys.readouterr().out
    assert out.exists() and set(cloud.fetched) == {f"unet/{FULL}"}


def test_what_is_a_path_is_not_asked_for_on_the_hub(tmp_path, monkeypatch):
    """A missing file, or anything missing in a folder that is there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("org/x.safetensors", "org/x.ckpt", "models/sdxl", "/a/b", "a/b/c", "x", "../a"):
        assert hub.parse_hub_id(name) is None, name
    assert hub.parse_hub_id("org/m@rev") == hub.HubId("org/m", "rev")
    assert hub.parse_hub_id("hf://models/sdxl/a/") == hub.HubId("models/sdxl", None, "a")
    assert hub.parse_hub_id(Path("hf://org/m@1/x").as_posix()) == hub.HubId("org/m", "1", "x")
    assert hub.parse_hub_id("hf:///m") is None
    for name in ("hf://org", "hf://org/m/../../x", "hf://org/m@a b/c"):
        with pytest.raises(UnsupportedFormat, match="a hub id is"):
            hub.parse_hub_id(name)


def test_what_the_hub_answers_is_passed_on(cloud):
    said = r"org/m: no such file or folder, and the .* Hub .* 404: org/m"
    with pytest.raises(UnsupportedFormat, match=said):
        open_base("org/m")
