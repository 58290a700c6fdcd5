"""LoRAs by hub id: which files of a repository one is, in every verb, and what is refused."""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import pytest
from hubs import ask_client
from lora_files import same_bits
from mini import write_case

import prolora
from prolora.files import hub
from prolora.fleet.listing import list_loras

SOLE = "weights-v1.5.safetensors"
# As PEFT and diffusers save them.
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
errors = pytest.importorskip(
    "huggingface_hub.errors", reason="huggingface_hub is not installed (extra hub)"
)
# The client's HTTP library: requests, httpx or httpx2.
http = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])


@pytest.fixture
def case(cloud, tmp_path):
    """(LoRA, source, target), beside the working folder and the hub."""
    (tmp_path / "here").mkdir()
    return write_case(tmp_path / "here")


def publish(cloud, lora, *names, repo="org/style-v1.5"):
    """Puts a LoRA on the hub, under each of the names; gives the folder of the repository."""
    for name in names:
        (cloud.folder / repo / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(lora, cloud.folder / repo / name)
    return cloud.folder / repo


@pytest.mark.parametrize(
    ("id_", "files", "taken"),
    [
        ("org/style-v1.5", [SOLE, "README.md"], SOLE),
        ("org/style-v1.5", [DIFFUSERS_WEIGHTS, "step_500.safetensors"], DIFFUSERS_WEIGHTS),
        ("org/style-v1.5@v2", [SOLE, "old/" + SOLE], SOLE),
        ("hf://org/style-v1.5/old", [SOLE, "old/" + SOLE, "old/x.png"], "old/" + SOLE),
        ("hf://org/style-v1.5@v2/b.safetensors", [SOLE, "b.safetensors"], "b.safetensors"),
    ],
)
def test_one_file_of_a_repository_is_the_lora(cloud, case, id_, files, taken):
    lora, source, target = case
    publish(cloud, lora, *files)
    prolora.transfer(id_, source, target, out="out.safetensors")
    assert cloud.fetched == [taken]  # once, though it is opened and hashed several times
    assert cloud.asked == ("v2" if "@v2" in id_ else None)
    prolora.transfer(lora, source, target, out="plain.safetensors")
    assert same_bits("out.safetensors", "plain.safetensors")


def test_of_what_peft_saves_the_configuration_counts_and_the_result_is_its_like(cloud, case):
    lora, source, target = case
    folder = cloud.folder / "org" / "peft"
    folder.parent.mkdir(parents=True)
    prolora.convert(lora, out=folder, format="peft")
    config = json.loads((folder / PEFT_CONFIG).read_text())
    (folder / PEFT_CONFIG).write_text(json.dumps(config | {"lora_alpha": 12.0}))
    (folder / "optimizer.safetensors").write_bytes(b"no LoRA")
    for name, given in (("one", "org/peft"), ("two", folder)):
        (outcome,) = prolora.transfer_many([given], source, target, name)
        assert outcome.status == "moved" and outcome.out == Path(name, "peft")
    assert cloud.fetched == [PEFT_CONFIG, PEFT_WEIGHTS]
    assert same_bits(*(Path(name, "peft", PEFT_WEIGHTS) for name in ("one", "two")))


REFUSED = {
    "several LoRAs": (
        ["b.safetensors", "a.safetensors"],
        "org/style-v1.5: holds several LoRAs; the repository has a.safetensors, b.safetensors: "
        "name one as hf://org/style-v1.5/a.safetensors",
    ),
    "many": (
        [f"step_{i:02}.safetensors" for i in range(20)],
        "step_11.safetensors and 8 more: name one as hf://org/style-v1.5/step_00.safetensors",
    ),
    "one in a folder": (
        ["README.md", "sdxl/a.safetensors"],
        "there is no LoRA; the repository has sdxl/a.safetensors: name one as "
        "hf://org/style-v1.5/sdxl/a.safetensors",
    ),
    "pickles": (
        [PEFT_CONFIG, "adapter_model.bin"],
        "there is no LoRA; the repository has adapter_model.bin: name one as",
    ),
    "no weights": (["README.md"], "there is no LoRA: no file of it ends in .safetensors"),
    "a model": (
        ["model_index.json", "sdxl.safetensors", "unet/model.safetensors"],
        "the repository of a model, not a LoRA",
    ),
}


@pytest.mark.parametrize("files, said", REFUSED.values(), ids=REFUSED)
def test_a_repository_without_one_lora_is_refused_before_anything_is_fetched(
    cloud, case, files, said
):
    publish(cloud, case[0], *files)
    with pytest.raises(prolora.errors.UnsupportedFormat, match=re.escape(said)) as error:
        prolora.check("org/style-v1.5")
    assert error.value.code == "unsupported-format" and not cloud.fetched


def test_the_way_to_name_one_of_several_keeps_the_revision_and_works(cloud, case):
    publish(cloud, case[0], "b.safetensors", "a.safetensors")
    with pytest.raises(prolora.errors.UnsupportedFormat) as error:
        prolora.check("org/style-v1.5@v2")
    named = str(error.value).rpartition(" ")[2]
    assert named == "hf://org/style-v1.5@v2/a.safetensors"
    assert prolora.check(named).kind == "lora" and cloud.asked == "v2"


def answer(kind):
    """An error of the real client."""
    return kind("from the client", response=SimpleNamespace(headers={}, request=None))


NO_NETWORK = getattr(http, "ConnectError", http.__dict__.get("ConnectionError"))
CLIENT = [
    (
        answer(errors.RepositoryNotFoundError),
        "missing-file",
        "no such repository, or a private one",
    ),
    (answer(errors.GatedRepoError), "hub-unavailable", "ask on its page"),
    (answer(errors.RevisionNotFoundError), "missing-file", "has no such revision"),
    (answer(errors.RemoteEntryNotFoundError), "missing-file", "has no such file in it"),
    (NO_NETWORK("refused"), "hub-unavailable", "cannot be reached.*HF_HUB_OFFLINE=1"),
    (http.ReadTimeout("slow"), "hub-unavailable", "cannot be reached"),
    (answer(errors.HfHubHTTPError), "hub-unavailable", "does not give it: from the client"),
]


@pytest.mark.parametrize("refusal, code, said", CLIENT, ids=lambda x: type(x).__name__)
def test_what_the_client_raises_is_an_error_with_a_code_for_loras_and_bases(
    cloud, refusal, code, said
):
    cloud.refusal = refusal
    for open_it in (prolora.check, prolora.open_base):
        with pytest.raises(prolora.errors.MissingFile, match=said) as error:
            open_it("org/name")
        assert error.value.code == code
        assert str(error.value).startswith("org/name: no such file or folder, and the Hugging Face")


def test_offline_the_cache_alone_is_looked_at(cloud, case):
    cloud.constants.HF_HUB_OFFLINE = True
    publish(cloud, case[0], SOLE)
    assert prolora.check("org/style-v1.5").kind == "lora" and not cloud.fetched
    publish(cloud, case[0], PEFT_WEIGHTS, repo="org/half")
    with pytest.raises(prolora.errors.HubUnavailable, match=f"org/half/{PEFT_CONFIG}: .* lacks it"):
        prolora.check("org/half")


def test_what_is_here_is_never_asked_for_on_the_hub(cloud, case):
    lora, source, target = case
    cloud.refusal = AssertionError("the hub was asked")
    Path("org").mkdir()
    shutil.copy(lora, "org/style")
    prolora.transfer("org/style", source, target, out="out.safetensors")
    for missing in ("org/other", "x.safetensors", "no/x.safetensors", "name"):
        with pytest.raises(prolora.errors.MissingFile) as error:
            prolora.check(missing)
        assert error.value.code == "missing-file" and "Hub" not in str(error.value)


def test_every_verb_takes_an_id(cloud, case):
    lora, source, target = case
    publish(cloud, lora, SOLE)
    id_ = "org/style-v1.5"
    assert (checked := prolora.check(id_, base=source)) and checked.path == id_
    assert prolora.convert(id_, source).report.source == "style-v1.5"
    assert prolora.convert(id_, out="c.safetensors").report.modules
    assert prolora.transfer(id_, source, target, dry_run=True).report.modules
    assert prolora.transfer(id_, source, target).report.modules
    assert prolora.check(id_, source=source, target=target).move
    merged = prolora.merge([id_, lora], source)
    assert {part.name for part in merged.report.parts} == {"style-v1.5", "lora"}
    assert prolora.merge([id_, lora], source, out="m.safetensors").report.modules


def test_an_id_keeps_its_slashes_in_a_path_of_windows(cloud):
    for name in ("org/style", "org/style@v1.5", "hf://org/style@v1/a/b.safetensors"):
        path = PureWindowsPath(name)
        assert "\\" in str(path)
        assert hub.find_hub_id(path) == hub.parse_hub_id(name)
        assert hub.spell_path(path) == name
    for name in ("C:/org/style", "org/x.safetensors", "x"):
        path = PureWindowsPath(name)
        assert hub.find_hub_id(path) is None and hub.spell_path(path) == str(path)


def test_a_batch_names_results_by_the_ids_goes_on_where_it_was_and_passes_by_what_fails(
    cloud, case
):
    lora, source, target = case
    publish(cloud, lora, SOLE)
    publish(cloud, lora, "a.safetensors", "b.safetensors", repo="org/two")
    loras = ["org/style-v1.5@v2", "org/two", "hf://org/two/a.safetensors", lora]
    for status in ("moved", "already there"):
        done = prolora.transfer_many(loras, source, target, "out")
        assert [one.status for one in done] == [status, "failed", status, status]
    assert [one.out.stem for one in done] == ["style-v1.5", "two", "a", "lora"]
    told = [one.to_dict()["lora"] for one in done]
    assert told == [*loras[:3], str(lora)]


def test_a_collection_takes_bare_ids_and_collections_of_the_hub(cloud, case):
    one = publish(cloud, case[0], "a.safetensors", "b.safetensors", "c.png", repo="org/two")
    other = publish(cloud, case[0], DIFFUSERS_WEIGHTS, repo="org/one")
    found = [one / "a.safetensors", one / "b.safetensors"]
    assert list_loras("org/two@v1") == found and cloud.asked == "v1"
    items = [SimpleNamespace(item_id=f"org/{x}", item_type="model") for x in ("two", "one")]
    data = SimpleNamespace(item_id="org/data", item_type="dataset")
    cloud.collections["org/best-1"] = SimpleNamespace(items=[*items, data])
    assert list_loras("hf://collections/org/best-1") == [*found, other]
    assert not any(name.endswith(".png") for name in cloud.fetched)


def test_a_line_that_the_hub_does_not_give_is_refused_alone(cloud, case):
    lora, source, target = case
    Path("all.txt").write_text(f"gone/adapter\nhf://c/d\n{lora}\n")
    cloud.refusal = LookupError("no")
    found = prolora.migrate("all.txt", source, target, "", dry_run=True)
    refused = {Path(x.lora).name: x.error for x in found}
    assert "no such file" in refused["adapter"] and "no such file" in refused["d"]
    assert not refused["lora.safetensors"]


@pytest.mark.slow
def test_the_real_client_fetches_what_peft_saved_and_finds_it_again_offline(
    hub_server, case, tmp_path
):
    address, repo, fetched = hub_server
    prolora.convert(case[0], out=repo / "peft", format="peft")
    shutil.copy(case[0], repo / SOLE)
    program = """
import prolora
for id_ in ids:
    try:
        found = prolora.check(id_)
    except prolora.ProLoRAError as error:
        print(error.code, " ".join(str(error).split()))
    else:
        print(found.kind, found.format, sum(found.modules.values()))
"""
    ids = ["org/m", "hf://org/m@v2/peft", "hf://org/m/nothing.safetensors", "org/other"]
    for offline in (False, True):
        said = ask_client(program, ids, address, tmp_path / "home", offline)
        assert said[:2] == ["lora kohya 12", "lora peft 12"]
        for told, name in zip(said[2:], ("org/m/nothing.safetensors", "org/other"), strict=True):
            assert told.startswith(f"{'hub-unavailable' if offline else 'missing-file'} {name}: no")
    wanted = [SOLE, f"peft/{PEFT_CONFIG}", f"peft/{PEFT_WEIGHTS}"]
    assert sorted(fetched) == sorted(wanted)


def test_without_the_client_the_message_says_how_to_get_it(cloud, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(prolora.errors.MissingFile, match="pip install huggingface_hub,"):
        prolora.check("org/name")


def test_what_is_written_as_a_path_is_not_asked_for_on_the_hub(cloud, case):
    _, source, target = case
    cloud.refusal = AssertionError("the hub was asked")
    names = ["./org/a", "org/b/", "../org/c", "org/list.txt", "org/x.sft", "org/x.zip"]
    for one in prolora.transfer_many(names, source, target, "out"):
        assert "Hub" not in str(one.error) and one.error.code == "missing-file"
    with pytest.raises(prolora.errors.MissingFile, match="no such file") as error:
        prolora.transfer("./org/style", source, target, out="out.safetensors")
    assert "Hub" not in str(error.value)


def test_the_real_client_reads_a_cache_that_is_here(case, tmp_path):
    """Laid out as the hub's documentation says, with refs, blobs and links to them."""
    commit, home = "f" * 40, tmp_path / "home"
    folder = home / "hub" / "models--org--style"
    for part in ("refs", "blobs", f"snapshots/{commit}"):
        (folder / part).mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    shutil.copy(case[0], folder / "blobs" / "abc")
    (folder / "snapshots" / commit / SOLE).symlink_to("../../blobs/abc")
    program = """
import prolora
for id_ in ids:
    try:
        print(prolora.check(id_).kind)
    except prolora.ProLoRAError as error:
        print(error.code)
"""
    ids = ["org/style", f"org/style@{commit}", "org/style@v2", "org/none"]
    said = ask_client(program, ids, "http://127.0.0.1:9", home, offline=True)
    assert said == ["lora", "lora", "hub-unavailable", "hub-unavailable"]
