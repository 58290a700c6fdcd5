"""Plans: whose LoRA each is, what cannot move and why, from headers alone."""

import pytest
from fleet_files import RATES, some_tensors
from mini import shapes, source_weights, write_folder
from safetensors.torch import save_file
from spectra import weights

import prolora
from prolora.files.safetensors_file import SafetensorsFile
from prolora.workflow.fleet.calibration import calibrate
from prolora.workflow.fleet.plan import select_shard


def make(loras, sources, targets, **options):
    return prolora.plan_migration(loras, sources, targets, rates=RATES, **options)


@pytest.fixture
def sources(collection, tmp_path):
    """The source, another base of its shapes, and one of other widths."""
    same = write_folder(tmp_path / "cousin", {n: -w for n, w in source_weights().items()})
    wide = {name: weights(m, 2 * n, seed=3) for name, (m, n) in shapes(3).items()}
    return [collection[1], same, write_folder(tmp_path / "wide", wide)]


def test_the_header_tells_to_which_of_several_bases_a_lora_belongs(sources, collection, tmp_path):
    folder, listed = tmp_path / "more", tmp_path / "list.txt"
    folder.mkdir()
    for name, metadata in (
        ("named", {"ss_sd_model_name": "cousin.safetensors"}),
        ("nameless", {}),
        ("listed", {}),
    ):
        save_file(some_tensors(2, 5), folder / f"{name}.safetensors", metadata)
    wide = {k: t.repeat(1, 2) if "lora_down" in k else t for k, t in some_tensors(2, 5).items()}
    save_file(wide, folder / "wide.safetensors")
    listed.write_text(f"# some\nmore/listed.safetensors\t{sources[0]}\n")
    plan = make([listed, folder], sources, collection[2][:1])
    entries = {entry.lora.rpartition("/")[2].partition(".")[0]: entry for entry in plan.entries}
    assert entries["named"].pair.source == "cousin" and entries["listed"].pair.source == "source"
    assert entries["nameless"].refused.startswith("it fits source, cousin, and its header")
    assert entries["wide"].pair.source == "wide" and "between widths" in entries["wide"].refused


def test_a_lora_that_was_moved_goes_on_from_where_it_is_now(sources, collection, tmp_path):
    loras, source, targets = collection
    moved = tmp_path / "moved" / "a.safetensors"
    moved.parent.mkdir()
    prolora.transfer_file(loras / "a.safetensors", source, targets[0], moved)
    plan = make([moved], [source, targets[0]], targets[1:])
    assert [entry.pair.source for entry in plan.entries] == ["target"]
    plan = make([moved], [source], targets[1:])
    assert "already moved" in plan.entries[0].refused
    plan = make([moved], [source, targets[0]], targets[:1])
    assert plan.entries[0].refused == "it is a LoRA of the target already"


def test_only_headers_are_read_and_each_kind_of_header_is_judged_once(collection, monkeypatch):
    loras, source, targets = collection
    read = []
    monkeypatch.setattr(SafetensorsFile, "read", lambda *_: read.append(1))
    save_file({k: t + 1 for k, t in some_tensors(4, 12).items()}, loras / "like-a.safetensors")
    plan = make([loras], source, targets)
    assert not read and sum(not entry.refused for entry in plan.entries) == 10


def test_a_plan_says_what_it_costs_and_refuses_low_coverage(collection):
    loras, source, targets = collection
    plan = make([loras / "a.safetensors"], source, targets, min_coverage=0.9, strength=0.5)
    assert ["coverage" in entry.refused for entry in plan.entries] == [True, True]
    plan = make([loras / "a.safetensors"], source, targets)
    entry = plan.entries[0]
    assert entry.size == (loras / "a.safetensors").stat().st_size
    assert entry.seconds > 0.01 and entry.memory > entry.size
    assert plan.bases[entry.pair.source].bytes > 5_000


@pytest.mark.parametrize(
    "sides", [(2, 1), (2, 0.5), (1, 2)], ids=["wider", "wider-and-narrower", "longer"]
)
@pytest.mark.parametrize("options", [{}, {"min_coverage": 0.9}, {"out_rank": "1KB"}], ids=str)
def test_a_plan_refuses_what_a_dry_run_refuses(collection, tmp_path, sides, options):
    """Beside the widths that the LoRA has: a module that it leaves alone is narrower."""
    loras, source, _ = collection
    rows, columns = sides
    names = list(shapes(3))
    tensors = {
        name: weights(m, n // 2, seed=5)
        if name == names[-1]
        else weights(int(m * rows), int(n * columns), seed=4)
        for name, (m, n) in shapes(3).items()
    }
    target = write_folder(tmp_path / "other", tensors)
    lora = loras / "c.safetensors"  # of the first five modules
    (entry,) = make([lora], source, target, **options).entries
    with pytest.raises(prolora.ProLoRAError) as told:
        prolora.plan_report(lora, source, target, **options)
    assert entry.refused == str(told.value)


def test_another_file_option_or_base_is_another_move(collection, plan):
    loras, source, targets = collection
    keys = {plan.key(entry) for entry in plan.entries}
    assert len(keys) == 10
    assert {plan.key(e) for e in make([loras], source, targets).entries} == keys
    other = make([loras], source, targets, strength=0.5)
    assert not keys & {other.key(entry) for entry in other.entries}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"strength": -1}, "strength"),
        ({"sterngth": 1}, "sterngth"),
        ({"device": "cpu"}, "not an option of a plan"),
    ],
)
def test_options_that_no_plan_takes_are_refused_at_once(collection, options, message):
    with pytest.raises(prolora.InvalidOption, match=message):
        make([collection[0]], collection[1], collection[2], **options)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_share_a_plan_out(plan, count, monkeypatch):
    monkeypatch.setattr("prolora.workflow.fleet.plan.BATCH_LORAS", 1)
    batches = plan.list_batches()
    shards = [select_shard(batches, (number, count)) for number in range(1, count + 1)]
    assert [batch for shard in shards for batch in shard] == batches
    for shard in ("3/2", "2-8", (1, 2, 3), (0, 2), (1.5, 2), 3):
        with pytest.raises(prolora.InvalidOption, match="shard"):
            select_shard(batches, shard)


def test_a_machine_is_measured():
    rates = calibrate()
    assert 0 < rates.per_operation < rates.per_byte < rates.per_module < 1
