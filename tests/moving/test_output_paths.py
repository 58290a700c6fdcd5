"""No output overwrites an input or another output, whatever links and volumes do to names."""

import shutil
import unicodedata

import pytest

import prolora


def twins(lora, *names):
    """Copies of a LoRA, each in a folder of its own."""
    copies = []
    for i, name in enumerate(names):
        copy = lora.parent / str(i) / name
        copy.parent.mkdir()
        shutil.copy(lora, copy)
        copies.append(copy)
    return copies


def test_a_link_onto_another_input_of_the_call_is_not_written_through(case, tmp_path):
    lora, source, target = case
    first, second = twins(lora, "first.safetensors", "second.safetensors")
    before = second.read_bytes()
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / first.name).symlink_to(second)
    for overwrite in (False, True):
        with pytest.raises(prolora.errors.OutputError, match=second.name):
            prolora.transfer_many([first, second], source, target, moved, overwrite=overwrite)
    assert second.read_bytes() == before


@pytest.mark.parametrize(
    "names",
    [
        ("style.safetensors", "Style.safetensors"),
        ("straße.safetensors", "STRASSE.safetensors"),
        tuple(unicodedata.normalize(form, "café.safetensors") for form in ("NFC", "NFD")),
        ("x.safetensors", "x.safetensors"),
    ],
)
def test_names_that_some_volumes_take_for_one_are_refused(case, tmp_path, names):
    lora, source, target = case
    with pytest.raises(prolora.errors.OutputError, match="overwrite each other"):
        prolora.transfer_many(twins(lora, *names), source, target, tmp_path / "moved")
    assert not (tmp_path / "moved").exists()


def test_two_outputs_that_are_links_to_one_file_are_refused(case, tmp_path):
    lora, source, target = case
    loras = twins(lora, "a.safetensors", "b.safetensors")
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "a.safetensors").symlink_to(moved / "b.safetensors")
    with pytest.raises(prolora.errors.OutputError, match="overwrite each other"):
        prolora.transfer_many(loras, source, target, moved)


def test_a_folder_of_peft_takes_no_name_of_a_file(case, tmp_path):
    lora, source, target = case
    folder, file = tmp_path / "peft", tmp_path / "x.safetensors"
    prolora.convert(lora, out=folder, format="peft")
    for verb in (
        lambda **known: prolora.convert(folder, **known),
        lambda **known: prolora.merge([folder, lora], **known),
        lambda **known: prolora.transfer(folder, source, target, **known),
        lambda out: prolora.convert(folder).save(out),
    ):
        with pytest.raises(prolora.errors.OutputError, match="is the name of a file"):
            verb(out=file)
    prolora.convert(folder, out=file, format="diffusers")
    assert file.is_file()


def test_an_empty_name_is_no_output(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(prolora.errors.OutputError, match="has an empty name"):
        prolora.transfer(*case, out="")
    with pytest.raises(prolora.errors.OutputError, match="has an empty name"):
        prolora.merge([case[0]] * 2, case[1], out="")
    done = prolora.transfer(*case)
    with pytest.raises(prolora.errors.OutputError, match="has an empty name"):
        done.save("")
    with pytest.raises(prolora.errors.OutputError, match="has an empty name"):
        prolora.transfer_many(case[:1], *case[1:], "")


@pytest.mark.parametrize("inner", [".", "target"])
def test_an_adapter_is_not_written_into_a_folder_that_holds_a_base(case, tmp_path, inner):
    lora, source, target = case
    models = tmp_path / "models"
    base = shutil.copytree(target, models / "target")
    before = sorted(models.rglob("*"))
    with pytest.raises(prolora.errors.OutputError, match="holds the input"):
        prolora.transfer(lora, source, base, out=models / inner, format="peft", overwrite=True)
    assert sorted(models.rglob("*")) == before


@pytest.mark.parametrize("there", [False, True])
def test_several_loras_take_a_folder_named_as_a_file_only_where_it_is_there(case, tmp_path, there):
    lora, source, target = case
    two = twins(lora, "a.safetensors", "b.safetensors")
    folder = tmp_path / "x.safetensors"
    if there:
        folder.mkdir()
        prolora.transfer_many(two, source, target, folder, method="copy")
        return
    with pytest.raises(prolora.errors.OutputError, match="several LoRAs need a folder"):
        prolora.transfer_many(two, "no/such", target, folder)
    assert not folder.exists()
