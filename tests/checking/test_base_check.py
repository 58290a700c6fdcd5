"""A source that is not the LoRA's base, and a target that is, are refused by headers alone."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from lora_files import attention_lora, empty_base, pair, save, usual_lora
from mini import source_weights, write_case, write_folder
from safetensors.torch import load_file, save_file

import prolora
from prolora import errors


def write_base(path, seed):
    """A file of the mini source's shapes, longer than the bytes that the short hash is of."""
    tensors = {
        f"{n}.weight": x + 0.01 * seed * torch.randn_like(x) for n, x in source_weights().items()
    }
    more = {f"zz.{i}": torch.randn(1024, 200) for i in range(2)}
    save_file(tensors | more, path)
    return path


def say_base(lora, path, **header):
    save_file(load_file(lora), path, header)
    return path


def kohya_hashes(base):
    """What sd-scripts writes of a base file: written down from its definition, not from ours."""
    data = base.read_bytes()
    return {
        "ss_new_sd_model_hash": hashlib.sha256(data).hexdigest(),
        "ss_sd_model_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
    }


@pytest.fixture
def files(tmp_path):
    """A LoRA without a header of its own, and two bases of one architecture."""
    (tmp_path / "case").mkdir()
    lora, _, _ = write_case(tmp_path / "case")
    a, b = (write_base(tmp_path / f"{name}.safetensors", i) for i, name in enumerate("ab", 1))
    return lora, a, b


@pytest.fixture
def unread(monkeypatch):
    monkeypatch.setattr(prolora.Base, "read", lambda *x: pytest.fail("a weight was read"))


@pytest.mark.parametrize("keys", [(0, 1), (0,), (1,)])
def test_a_lora_with_the_hash_of_the_target_is_refused_as_swapped(files, tmp_path, unread, keys):
    lora, a, b = files
    stated = dict([*kohya_hashes(a).items()][i] for i in keys)
    of_a = say_base(lora, tmp_path / "of_a.safetensors", **stated)
    with pytest.raises(errors.WrongBase, match=r"of_a.*a\.safetensors.*b\.safetensors.*swap"):
        prolora.transfer(of_a, b, a)
    with pytest.raises(errors.WrongBase, match="did you swap them"):
        prolora.transfer(of_a, b, a, dry_run=True)


def test_the_right_way_round_and_the_override_pass(files, tmp_path):
    lora, a, b = files
    of_a = say_base(lora, tmp_path / "of_a.safetensors", **kohya_hashes(a))
    assert prolora.transfer(of_a, a, b, dry_run=True).report.totals["mapped"]
    assert prolora.transfer(of_a, b, a, again=True).report.totals["mapped"]
    (outcome,) = prolora.transfer_many([of_a], b, a, tmp_path / "out")
    assert isinstance(outcome.error, errors.WrongBase)
    swapped = prolora.check(of_a, source=b, target=a)
    assert swapped.mark == "✖" and "did you swap them" in swapped.headline


def test_a_migration_refuses_the_swap_for_that_lora_alone(files, tmp_path):
    lora, a, b = files
    of_a = say_base(lora, tmp_path / "of_a.safetensors", **kohya_hashes(a))
    of_b = say_base(lora, tmp_path / "of_b.safetensors", **kohya_hashes(b))
    found = prolora.migrate([of_a, of_b], b, a, tmp_path / "out", dry_run=True)
    refused = {Path(moved.lora).name: moved.error for moved in found}
    assert "did you swap them" in refused["of_a.safetensors"]
    assert refused["of_b.safetensors"] == ""


@pytest.mark.parametrize("word", ["NOFILE", "IsADirectory", "None", "", "e3b0c442", "1" * 64])
def test_what_is_no_hash_of_a_file_or_of_another_proves_nothing(files, tmp_path, word):
    """A base that is neither is taken as given: files are converted."""
    lora, a, b = files
    header = {"ss_sd_model_hash": word[:8], "ss_new_sd_model_hash": word}
    named = say_base(lora, tmp_path / "named.safetensors", **header)
    for bases in ((a, b), (b, a)):
        assert prolora.transfer(named, *bases, dry_run=True).report.totals["mapped"]


def test_the_whole_hash_decides_where_two_files_share_the_short_one(files, tmp_path):
    lora, a, b = files
    more = {key: x for key, x in load_file(a).items() if key.startswith("zz")}
    save_file(load_file(b) | more, b)
    stated = kohya_hashes(a)
    assert stated["ss_sd_model_hash"] == kohya_hashes(b)["ss_sd_model_hash"]
    of_a = say_base(lora, tmp_path / "of_a.safetensors", **stated)
    assert prolora.transfer(of_a, a, b, dry_run=True).report.totals["mapped"]
    with pytest.raises(errors.WrongBase):
        prolora.transfer(of_a, b, a, dry_run=True)


def test_the_name_of_the_target_is_said_first_and_refuses_nothing(files, tmp_path):
    lora, a, b = files
    named = say_base(lora, tmp_path / "named.safetensors", ss_sd_model_name="A_fp16.safetensors")
    assert not prolora.transfer(named, a, b, dry_run=True).report.warnings
    for dry_run in (True, False):
        report = prolora.transfer(named, b, a, dry_run=dry_run).report
        (doubt,) = report.warnings
        assert "the name of the target, a.safetensors" in doubt and report.totals["mapped"]
        assert str(report.in_words()).startswith("⚠ Were source and target swapped?")
        assert "Were source and target swapped?" in report.to_html()
        assert report.to_dict()["warnings"] == [doubt]


def test_the_base_that_a_peft_folder_names_is_said_alike(files, tmp_path):
    lora, a, b = files
    done = prolora.transfer(lora, a, b, method="copy")
    done.save(tmp_path / "peft", format="peft")
    config = (tmp_path / "peft" / "adapter_config.json").read_text()
    (tmp_path / "peft" / "adapter_config.json").write_text(
        config.replace("{", '{"base_model_name_or_path": "someone/b",', 1)
    )
    weights = tmp_path / "peft" / "adapter_model.safetensors"
    save_file(load_file(weights), weights)  # without prolora's header
    (doubt,) = prolora.transfer(tmp_path / "peft", a, b, dry_run=True).report.warnings
    assert "the name of the target, b.safetensors" in doubt


def test_source_and_target_that_are_one_model_are_refused(files, tmp_path, unread):
    lora, a, _ = files
    copied = shutil.copy(a, tmp_path / "copy.safetensors")
    linked = tmp_path / "link.safetensors"
    linked.symlink_to(a)
    opened = prolora.open_base(source_weights())
    for source, target in ((a, a), (a, copied), (a, linked), (opened, opened)):
        with pytest.raises(errors.WrongBase, match=r"are the same model.*again"):
            prolora.transfer(lora, source, target)
        with pytest.raises(errors.WrongBase, match="are the same model"):
            prolora.transfer(lora, source, target, dry_run=True)
        assert prolora.transfer(lora, source, target, again=True, dry_run=True).report.coverage


def test_a_pipeline_and_the_folder_of_its_model_are_one_base(tmp_path):
    model = write_folder(tmp_path / "pipe" / "unet", source_weights())
    (tmp_path / "case").mkdir()
    encoder = write_folder(tmp_path / "pipe" / "text_encoder", {"text_model.x": torch.ones(2, 2)})
    (encoder / "diffusion_pytorch_model.safetensors").rename(encoder / "model.safetensors")
    whole, (lora, _, other) = tmp_path / "pipe", write_case(tmp_path / "case")
    for bases in ((whole, model), (model, whole)):
        with pytest.raises(errors.WrongBase, match="are the same model"):
            prolora.transfer(lora, *bases, dry_run=True)
    assert prolora.transfer(lora, whole, other, dry_run=True).report.totals["mapped"]


@pytest.mark.parametrize(
    "lora, prefix, source, target, said",
    [
        ("sdxl", "unet.", "sd15", "sd21", "is for Stable Diffusion XL. The source you gave.*1.5"),
        ("flux1-dev", "transformer.", "sd15", "sdxl", r"is for .*FLUX\.1.*\. The source.* 1\.5\. "),
        ("sd15", "unet.", "sd21", "sdxl", r"is for Stable Diffusion 1\.5\. .*Diffusion 2\.1"),
    ],
)
def test_a_lora_of_another_model_is_called_by_that_models_name(lora, prefix, source, target, said):
    tensors = usual_lora(lora, prefix)
    with pytest.raises(errors.WrongBase, match=said) as first:
        prolora.transfer(tensors, empty_base(source), empty_base(target), dry_run=True)
    with pytest.raises(errors.WrongBase) as second:
        prolora.transfer(tensors, empty_base(source), empty_base(target))
    assert str(first.value) == str(second.value) and "--" not in str(first.value)
    assert "swap" not in str(first.value)


def test_a_lora_that_fits_the_target_alone_is_asked_about():
    tensors = usual_lora("sdxl", "unet.")
    for again in (False, True):
        with pytest.raises(errors.WrongBase, match=r"XL\. .* It fits the target and not the sou"):
            prolora.transfer(
                tensors, empty_base("sd15"), empty_base("sdxl"), again=again, dry_run=True
            )


def test_a_lora_of_a_language_model_is_called_one():
    tensors, start = {}, "base_model.model.model.layers.0"
    for name in ("self_attn.q_proj", "mlp.gate_proj"):
        tensors |= pair(f"{start}.{name}", (64, 64), 2, ends=("lora_B", "lora_A"))
    with pytest.raises(errors.WrongBase, match=r"is for a language model\. The"):
        prolora.transfer(tensors, empty_base("sd15"), empty_base("sdxl"), dry_run=True)


def test_a_dora_that_does_not_fit_is_refused_before_its_base_is_read(tmp_path, unread):
    tensors = usual_lora("sdxl", "unet.")
    for key in [k for k in tensors if k.endswith("lora_B.weight")]:
        tensors[key.replace("lora_B.weight", "dora_scale")] = torch.ones(len(tensors[key]), 1)
    for lora in (save(tmp_path / "lora.safetensors", tensors), tensors):
        with pytest.raises(errors.WrongBase, match="is for Stable Diffusion XL"):
            prolora.transfer(lora, empty_base("sd15"), empty_base("sd21"))


def test_a_dry_run_doubts_a_source_whose_blocks_the_lora_leaves_out():
    lora = attention_lora("anima")
    source, target = map(empty_base, ("anima-2.9b", "anima-3.8b"))
    (told,) = prolora.transfer(lora, source, target, dry_run=True).report.warnings
    assert "all blocks of Anima; the source is Anima 2.9B." in told
    own = empty_base("anima")
    half = attention_lora("anima", keep=lambda block: int(block.number) < 14)
    for some in (lora, half):
        assert not prolora.transfer(some, own, target, dry_run=True).report.warnings
