"""Which file a base is: by its content, whatever a change to it leaves as it was."""

import hashlib
import json
import mmap
import os
import random
import shutil

import pytest
import torch
from mini import source_weights
from safetensors.torch import save_file

from prolora import open_base
from prolora.bases import leaves
from prolora.bases.identity import describe_reads, have_equal_files, name_base
from prolora.bases.leaves import digest_file
from prolora.bases.pipeline_identity import describe_pipeline_folder, digest_facts
from prolora.errors import UnsupportedFormat
from prolora.files import state
from prolora.files.safetensors_file import SafetensorsFile
from prolora.files.state import read_state

NAME = next(iter(source_weights()))


def write_base(path, value):
    path.parent.mkdir(exist_ok=True)
    save_file({f"{NAME}.weight": torch.full((64, 64), float(value))}, path)
    os.utime(path, (1_700_000_000,) * 2)
    return path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_that_is_changed_through_shared_memory_is_hashed_again(tmp_path):
    path = write_base(tmp_path / "base.safetensors", 1)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[-1] = memory[-1]
        os.fsync(file.fileno())
        before = path.stat().st_mtime_ns
        memory[-1] = memory[-1]
        if path.stat().st_mtime_ns == before:
            pytest.skip("this file system does not tell of changes through shared memory")
        first = digest_file(open_base(path).files[0])
        assert first == sha256(path)
        memory[-3] ^= 1
        assert digest_file(open_base(path).files[0]) == sha256(path) != first


@pytest.fixture
def hashed(monkeypatch):
    """The files that are hashed."""
    files, real = [], leaves.hash_file

    def count(file):
        files.append(file)
        return real(file)

    monkeypatch.setattr(leaves, "hash_file", count)
    return files


def keep_hash(path, folder):
    """As a new process does, which knows no hash but those of the folder."""
    leaves._known.clear()
    return digest_file(path, folder)


def test_a_hash_that_a_cache_keeps_is_that_of_the_file_as_it_is_now(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(leaves, "SETTLING_TIME", -(10**18))
    path = write_base(tmp_path / "base.safetensors", 1)
    first = keep_hash(path, tmp_path / "cache")
    assert keep_hash(path, tmp_path / "cache") == first == sha256(path) and hashed == [path]
    write_base(path, 2)  # of equal size and time
    assert keep_hash(path, tmp_path / "cache") == sha256(path) != first
    copy = write_base(tmp_path / "copy" / "base.safetensors", 3)
    assert keep_hash(copy, tmp_path / "cache") == sha256(copy) and hashed == [path, path, copy]


def test_the_state_of_a_file_has_pieces_of_its_content_on_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "_ON_WINDOWS", True)
    path, content = tmp_path / "x", bytearray(random.Random(0).randbytes(1 << 17))
    path.write_bytes(content[:99])
    assert read_state(path).pieces == hashlib.sha256(content[:99] * 18).hexdigest()
    seen = set()
    for place in (0, 70_000, -1, 0):  # in the first, a middle and the last piece
        path.write_bytes(content)
        seen.add(read_state(path).pieces)
        content[place] ^= 1
    assert len(seen) == 4


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps no time of a change: pieces decide")
def test_a_cache_keeps_no_hash_of_a_file_that_may_change_within_its_clock_tick(tmp_path, hashed):
    path = write_base(tmp_path / "base.safetensors", 1)
    for _ in range(2):
        assert keep_hash(path, tmp_path / "cache") == sha256(path)
    assert hashed == [path, path]


def test_a_base_stays_what_it_is_when_the_working_folder_changes(tmp_path, monkeypatch):
    paths = [write_base(tmp_path / name / "base.safetensors", i) for i, name in enumerate("ab")]
    monkeypatch.chdir(tmp_path / "a")
    base = open_base("base.safetensors")
    hashes = [digest_file(base.files[0])]
    monkeypatch.chdir(tmp_path / "b")
    assert torch.equal(base.read(NAME), torch.zeros(64, 64))
    assert name_base(base) == name_base(open_base(paths[0])) != name_base(open_base(paths[1]))
    hashes.append(digest_file(open_base("base.safetensors").files[0]))
    assert hashes == [sha256(path) for path in paths]


def test_a_file_that_changes_while_it_is_hashed_is_refused(tmp_path, monkeypatch):
    path = write_base(tmp_path / "base.safetensors", 1)
    base, real = open_base(path), leaves.hash_file

    def slow(file):
        write_base(path, 2)
        return real(file)

    monkeypatch.setattr(leaves, "hash_file", slow)
    with pytest.raises(UnsupportedFormat, match="was changed while it was in use"):
        digest_file(base.files[0])


def write_shards(folder):
    """A base of two files."""
    folder.mkdir()
    names, index = list(source_weights().items()), {}
    for i in range(2):
        file = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        part = {f"{name}.weight": tensor for name, tensor in names[i::2]}
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    return folder


def digest_all(base):
    """What was read of a base if all of it was."""
    return describe_reads(base, [set(one.file.tensors) for one in base.leaves])


def test_one_value_of_any_tensor_of_any_shard_makes_another_base(tmp_path):
    """No sample can miss it, and no copy is taken for another base."""
    source, copied = write_shards(tmp_path / "source"), tmp_path / "copy"
    shutil.copytree(source, copied)
    base, other = open_base(source), open_base(copied)
    assert digest_all(base) == digest_all(other) and have_equal_files(base, other)
    for file in sorted(copied.glob("*.safetensors")):
        for name in flip_each(file):
            assert digest_all(open_base(copied)) != digest_all(base), name
            assert not have_equal_files(base, open_base(copied)), name
    assert digest_all(open_base(copied)) == digest_all(base)


def flip_each(file):
    """The name of each tensor of a file, while one bit of it is changed."""
    whole, opened = file.read_bytes(), SafetensorsFile(file)
    for name, info in opened.tensors.items():
        changed = bytearray(whole)
        changed[opened.data_start + random.randrange(info.start, info.stop)] ^= 1
        file.write_bytes(changed)
        yield name
        file.write_bytes(whole)


def test_a_pipeline_is_known_by_its_settings_and_not_by_where_it_was(tmp_path):
    facts = []
    for place, width in (("here", 2), ("there", 2), ("here", 3)):
        part = tmp_path / f"{place}-{width}" / "unet"
        part.mkdir(parents=True)
        places = dict.fromkeys(("_name_or_path", "name_or_path", "_commit_hash"), place)
        (part / "config.json").write_text(json.dumps({"width": width} | places))
        index = {"_class_name": "Pipeline", "unet": ["diffusers", "UNet"], "_name_or_path": place}
        (part.parent / "model_index.json").write_text(json.dumps(index))
        facts.append(describe_pipeline_folder(part.parent))
    assert facts[0] == facts[1] and facts[0]["unet/config.json: width"] == "2"
    assert digest_facts(facts[0]) != digest_facts(facts[2])
