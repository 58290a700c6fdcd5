"""A result is kept while all that was read for it is as it was: no name, size or time decides."""

import json
import os
import random
import shutil

import pytest
from lora_files import read_header
from mini import lora_tensors, shapes, source_weights, target_weights, write_case
from safetensors.torch import load_file, save_file

import prolora
from prolora.bases import leaves
from prolora.errors import OutputExists, UnsupportedFormat
from prolora.files.safetensors_file import SafetensorsFile

FEW = list(shapes(3))[:5]


def flip(file, place):
    """Changes one bit of one byte of a file, and neither its size nor its time."""
    before = file.stat()
    with open(file, "r+b") as opened:
        opened.seek(place)
        value = opened.read(1)[0]
        opened.seek(place)
        opened.write(bytes([value ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def write_shards(folder, tensors):
    """A pipeline whose UNet is in two shards, in turn."""
    (folder / "unet").mkdir(parents=True)
    index = {}
    for i in range(2):
        name = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        part = {f"{k}.weight": x.contiguous() for k, x in list(tensors.items())[i::2]}
        save_file(part, folder / "unet" / name, {"format": "pt"})
        index |= dict.fromkeys(part, name)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    pipeline = {"_class_name": "X", "unet": ["diffusers", "UNet2DConditionModel"]}
    (folder / "model_index.json").write_text(json.dumps(pipeline))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A LoRA of five modules, two sharded pipelines, and a folder for results."""
    folder = tmp_path_factory.mktemp("made")
    names = {"lora_unet_" + name.replace(".", "_") for name in FEW}
    lora = {k: x for k, x in lora_tensors().items() if k.partition(".")[0] in names}
    save_file(lora, folder / "lora.safetensors")
    write_shards(folder / "source", source_weights())
    write_shards(folder / "target", target_weights())
    for door in DOORS.values():
        assert door(folder) is False  # a new result
    return folder


def by_out(folder, **options):
    """Whether `transfer` keeps its result."""
    files = [folder / name for name in ("lora.safetensors", "source", "target")]
    report = prolora.transfer(*files, out=folder / "out.safetensors", **options).report
    return bool(report.before)


def by_folder(folder):
    (done,) = prolora.transfer_many(
        [folder / "lora.safetensors"], folder / "source", folder / "target", folder / "many"
    )
    if done.error:
        raise done.error
    return done.kept


def by_names(folder):
    """Results that are named by digits are made again where they are not current."""

    def name_by_digits(lora, digits):
        return f"{lora.stem}-{digits}"

    ends = [folder / "lora.safetensors"], folder / "source", folder / "target"
    (done,) = prolora.transfer_many(*ends, folder / "named", naming=name_by_digits)
    assert done.error is None
    return done.kept


def by_migration(folder):
    (done,) = prolora.migrate(
        folder / "lora.safetensors", folder / "source", folder / "target", folder / "fleet"
    )
    assert not done.error
    return done.status == "already there"


DOORS = {"out": by_out, "many": by_folder, "naming": by_names, "migrate": by_migration}


def is_kept(door, folder):
    try:
        return DOORS[door](folder)
    except OutputExists:
        return False


def list_places(folder, few=False):
    """(file, byte, whether a transfer reads it, what it is), of all files or of a few."""
    drawn = random.Random(0)
    for file in sorted(folder.glob("*/unet/*.safetensors"))[:: 2 if few else 1]:
        opened = SafetensorsFile(file)
        for name, info in [*opened.tensors.items()][:: 4 if few else 1]:
            place = opened.data_start + drawn.randrange(info.start, info.stop)
            yield file, place, name.removesuffix(".weight") in FEW, name
        yield file, file.read_bytes().index(b'"pt"') + 1, True, "the header"
        yield next(file.parent.glob("*.json")), 2, True, "the index of the shards"
        index = file.parents[1] / "model_index.json"
        yield index, index.read_bytes().index(b'"X"') + 1, True, "the index of the pipeline"
    yield folder / "lora.safetensors", -1, True, "the LoRA"


@pytest.mark.parametrize("door", DOORS)
def test_any_byte_that_was_read_makes_a_result_of_its_own_and_no_other_byte_does(
    made, tmp_path, door
):
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    assert is_kept(door, folder)  # wherever the files are
    named = set()  # weights that name a base are read as well
    for file, place, used, name in list_places(folder, few=door != "out"):
        data = file.read_bytes()
        flip(file, place % len(data))
        kept = is_kept(door, folder)
        if used:
            assert not kept, name
        elif not kept:
            named.add((file.parent.parent.name, name))
        state = file.stat()
        file.write_bytes(data)
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
        is_kept(door, folder)  # what is named by digits is made again
    assert len(named) <= 6, named


def test_what_another_version_made_or_another_configuration_asks_for_is_not_kept(made, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    out, lora = folder / "out.safetensors", folder / "lora.safetensors"
    header = read_header(out)
    save_file(load_file(out), out, header)
    assert by_out(folder)
    save_file(load_file(out), out, header | {"prolora.version": "0.0.1"})
    assert not is_kept("out", folder)
    out.unlink()
    prolora.convert(lora, out=folder / "peft", format="peft")
    lora.unlink()
    (folder / "peft").rename(lora)
    assert [by_out(folder, format="kohya") for _ in range(2)] == [False, True]
    config = lora / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 5'))
    with pytest.raises(OutputExists):
        by_out(folder, format="kohya")


def test_result_that_another_process_wrote_meanwhile_is_kept(made, tmp_path):
    files = [made / name for name in ("lora.safetensors", "source", "target")]
    first, out = tmp_path / "first.safetensors", tmp_path / "out.safetensors"
    prolora.transfer(*files, out=first)

    def write_meanwhile(done, total, name):
        if name.startswith("writing"):
            shutil.copyfile(first, out)

    assert prolora.transfer(*files, out=out, progress=write_meanwhile).report.before
    assert out.read_bytes() == first.read_bytes()
    out.unlink()
    shutil.copyfile(files[0], first)  # something else has the name
    with pytest.raises(OutputExists):
        prolora.transfer(*files, out=out, progress=write_meanwhile)


def test_old_files_of_a_killed_run_vanish_with_the_next(made, tmp_path):
    """A PEFT folder that is replaced keeps its old files as `NAME.old` until the new are there."""
    folder, done = tmp_path / "lora", prolora.convert(made / "lora.safetensors")
    done.save(folder, format="peft")
    weights = folder / "adapter_model.safetensors"
    weights.rename(folder / "adapter_model.safetensors.old")
    done.save(folder, format="peft", overwrite=True)
    assert {file.name for file in folder.iterdir()} == {"adapter_config.json", weights.name}


def test_base_changed_between_two_reads_is_refused(tmp_path, monkeypatch):
    """Four bytes in place, the time put back: only a second digest of the tensor shows it."""
    # As of a file written just now, on a slow machine too.
    monkeypatch.setattr(leaves, "SETTLING_TIME", 10**18)
    lora, source, target = write_case(tmp_path)
    weights, out = next(source.glob("*.safetensors")), tmp_path / "out.safetensors"
    before, data = weights.stat(), weights.read_bytes()

    def change(done, total, name):
        if done == total and name.startswith("checking"):  # all were read once, and will be again
            with open(weights, "r+b") as file:
                file.seek(SafetensorsFile(weights).locate(f"{FEW[0]}.weight"))
                file.write(bytes(4))
            os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))

    how = {"out": out, "method": "prolora"}
    with pytest.raises(UnsupportedFormat, match="was changed while it was in use"):
        prolora.transfer(lora, source, target, progress=change, **how)
    assert not out.exists() and weights.read_bytes() != data
    weights.write_bytes(data)
    assert not prolora.transfer(lora, source, target, **how).report.before
    assert prolora.transfer(lora, source, target, **how).report.before


@pytest.mark.parametrize("method", ["auto", "best"])
def test_only_an_own_stale_result_is_replaced_by_its_name(made, tmp_path, method):
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)

    def move():
        ends = [folder / "lora.safetensors"], folder / "source", folder / "target"
        how = {"naming": lambda lora, digits: digits, "method": method}
        return prolora.transfer_many(*ends, folder / "digits", **how)[0]

    first = move()
    whole = first.out.read_bytes()
    flip(first.out, len(whole) - 1)
    assert (move().status, first.out.read_bytes()) == ("moved", whole)
    assert move().status == "already there"
    shutil.copyfile(folder / "lora.safetensors", first.out)  # somebody's LoRA of that name
    refused = move()
    assert isinstance(refused.error, OutputExists)
    assert first.out.read_bytes() == (folder / "lora.safetensors").read_bytes()
