"""A LoRA that was moved before goes on from the base that it was moved to, and from no other."""

import json
import time

import pytest
from lora_files import read_header
from mini import lora_tensors, source_weights, target_weights, write_case, write_folder
from safetensors.torch import load_file, save_file

import prolora
from prolora import errors


def write_file(path, tensors):
    save_file({f"{name}.weight": tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.fixture
def files(tmp_path):
    """A LoRA of base a that was moved to b, and the bases a, b and c: a file each."""
    lora, _, _ = write_case(tmp_path)
    a = write_file(tmp_path / "a.safetensors", source_weights())
    b = write_file(tmp_path / "b.safetensors", target_weights())
    c = write_file(tmp_path / "c.safetensors", target_weights(0.3))
    moved = tmp_path / "moved.safetensors"
    prolora.transfer(lora, a, b, out=moved, method="copy")
    return moved, a, b, c


def move(lora, source, target, out, **options):
    prolora.transfer(lora, source, target, out=out, method="copy", overwrite=True, **options)
    return read_header(out)


def test_moving_on_from_the_base_it_was_moved_to_keeps_the_chain(files, tmp_path):
    moved, _, b, c = files
    metadata = move(moved, b, c, tmp_path / "twice.safetensors")
    assert (metadata["prolora.source"], metadata["prolora.target"]) == (b.name, c.name)
    first, last = prolora.check(tmp_path / "twice.safetensors").moves
    assert prolora.check(moved).to_dict()["moves"][0]["method"] == "copy"
    assert (first.source, first.target) == ("a.safetensors", "b.safetensors")
    assert first.target_hash == last.source_hash and first.target_hash.startswith("weights:")
    third = move(tmp_path / "twice.safetensors", c, b, tmp_path / "thrice.safetensors")
    assert len(json.loads(third["prolora.earlier_moves"])) == 2
    names = ("a", "b", "c", "b")
    chain = "from " + " to ".join(f"{name}.safetensors" for name in names)
    assert chain in str(prolora.check(tmp_path / "thrice.safetensors"))


def test_another_base_is_refused_with_the_names_of_both_and_the_way_out(
    files, tmp_path, monkeypatch
):
    """Before a weight is read."""
    monkeypatch.setattr(prolora.Base, "read", lambda *x: pytest.fail("a weight was read"))
    moved, a, _, c = files
    out = tmp_path / "out.safetensors"
    for options in ({"match": "similarity"}, {"out": out}):
        with pytest.raises(errors.AlreadyMoved) as refused:
            prolora.transfer(moved, a, c, **options)
    text = str(refused.value)
    assert "already moved from a.safetensors to b.safetensors" in text
    assert "but the source is a.safetensors; give" in text
    assert "give b.safetensors as the source, or take `again=True`" in text
    assert not out.exists()
    base = c.rename(tmp_path / "base")  # which says no more than its role
    with pytest.raises(errors.AlreadyMoved, match=rf"the source is {tmp_path.name}/base; give b"):
        prolora.transfer(moved, base, a)


def test_again_moves_it_all_the_same_and_the_chain_says_so(files, tmp_path):
    moved, a, _, c = files
    move(moved, a, c, tmp_path / "out.safetensors", again=True)
    chain = "from a.safetensors to b.safetensors, then from a.safetensors to c.safetensors"
    assert chain in str(prolora.check(tmp_path / "out.safetensors"))


def test_every_door_refuses_it(files, tmp_path):
    moved, a, _, c = files
    with pytest.raises(errors.AlreadyMoved):
        prolora.transfer(moved, a, c, dry_run=True)
    (outcome,) = prolora.transfer_many([moved], a, c, tmp_path / "folder")
    assert isinstance(outcome.error, errors.AlreadyMoved)
    (outcome,) = prolora.transfer_many([moved], a, c, tmp_path / "folder", again=True)
    assert outcome.status == "moved"
    assert prolora.transfer(moved, a, c, again=True, dry_run=True).report.totals["mapped"]
    done = prolora.transfer(moved, a, c, again=True)
    with pytest.raises(errors.AlreadyMoved, match=r"^this LoRA"):
        prolora.transfer(done.adapter, a, c)


def test_a_base_renamed_or_in_another_precision_is_taken_for_the_same_with_a_word(files, tmp_path):
    """The header has a digest of three weights, which fine-tunes may share."""
    moved, a, b, c = files
    (tmp_path / "half").mkdir()
    half = tmp_path / "half" / "B_fp16.safetensors"
    save_file({key: tensor.half() for key, tensor in load_file(b).items()}, half)
    (doubt,) = prolora.transfer(moved, half, c, method="copy").report.warnings
    assert "moved to b.safetensors; whether B_fp16.safetensors is that model cannot" in doubt
    swapped = tmp_path / "half" / "b.safetensors"
    swapped.write_bytes(a.read_bytes())
    assert move(moved, swapped, c, tmp_path / "out.safetensors")
    assert not prolora.transfer(moved, b, c, method="copy").report.warnings
    other = b.rename(tmp_path / "quite-another-name.safetensors")
    (doubt,) = prolora.transfer(moved, other, c, method="copy").report.warnings
    assert "to b.safetensors; whether quite-another-name.safetensors is that model" in doubt
    header = move(moved, other, c, tmp_path / "out.safetensors")
    assert len(json.loads(header["prolora.earlier_moves"])) == 1


def test_bases_that_have_one_name_are_told_by_their_hashes(tmp_path):
    lora, _, _ = write_case(tmp_path)
    a = write_folder(tmp_path / "a" / "m", source_weights())
    b = write_folder(tmp_path / "b" / "m", target_weights())
    moved = tmp_path / "moved.safetensors"
    prolora.transfer(lora, a, b, out=moved, method="copy")
    with pytest.raises(errors.AlreadyMoved, match="the source is a/m; give b/m"):
        prolora.transfer(moved, a, b)
    assert prolora.transfer(moved, b, a, method="copy")


def test_a_base_of_several_files_is_told_by_weights_in_them(tmp_path):
    lora, _, _ = write_case(tmp_path)
    folders = []
    weights = {"a": source_weights(), "b": target_weights(), "c": target_weights()}
    for name, tensors in weights.items():
        pipeline = tmp_path / name
        write_folder(pipeline / "unet", tensors)
        encoder = write_folder(
            pipeline / "text_encoder", {"text_model.x": next(iter(tensors.values()))}
        )
        (encoder / "diffusion_pytorch_model.safetensors").rename(encoder / "model.safetensors")
        folders.append(pipeline)
    a, b, copy_of_b = folders
    moved = tmp_path / "moved.safetensors"
    prolora.transfer(lora, a, b, out=moved, method="copy")
    assert read_header(moved)["prolora.target_hash"].startswith("weights:")
    assert prolora.transfer(moved, copy_of_b, a, method="copy")
    with pytest.raises(errors.AlreadyMoved):
        prolora.transfer(moved, a, b)
    # The UNet alone has the same weights; its name says nothing.
    assert prolora.transfer(moved, b / "unet", a, method="copy")


def test_bases_in_memory_cannot_be_told_and_refuse_nothing(files):
    moved, a, _, _ = files
    (doubt,) = prolora.transfer(moved, target_weights(), a, method="copy").report.warnings
    assert "cannot be told" in doubt


@pytest.mark.parametrize("text", ["{", "[1, null]", '{"a": 1}', '[{"target": 3}]', "[" * 100_000])
def test_a_damaged_chain_is_no_reason_to_fail(tmp_path, text):
    header = {"prolora.target": "b", "prolora.earlier_moves": text}
    save_file(lora_tensors(), tmp_path / "lora.safetensors", header)
    found = prolora.check(tmp_path / "lora.safetensors")
    assert found.moves[-1].target == "b" and str(found).endswith("to b")


TOLD = "The LoRA was moved before, from a.safetensors to b.safetensors"


def test_the_report_of_a_second_move_says_that_losses_add_up(files, tmp_path):
    moved, a, b, c = files
    report = prolora.transfer(moved, b, c, out=tmp_path / "out.safetensors").report
    planned = prolora.transfer(moved, b, c, dry_run=True).report
    checked = prolora.check(moved, source=b, target=c)
    for words in (report.in_words(), planned.in_words(), checked.move):
        (told,) = (line for line in words.cautions if TOLD in line)
        assert "adds to what is lost now" in told
    first = prolora.transfer(tmp_path / "lora.safetensors", a, b)
    assert "moved before" not in str(first.report)
    assert report.to_dict()["moves"][0]["target_hash"].startswith("weights:")


def test_a_merge_on_one_base_is_no_move(files, tmp_path):
    _, a, b, _ = files
    merged = tmp_path / "merged.safetensors"
    prolora.merge([tmp_path / "lora.safetensors"] * 2, a, out=merged)
    report = prolora.transfer(merged, a, b, method="copy").report
    assert "moved before" not in str(report)


def test_a_list_of_earlier_moves_that_nobody_made_costs_no_time(files, tmp_path):
    moved, _, b, c = files
    names = [{"source": f"s{i}", "target": f"t{i}"} for i in range(100_000)]
    for listed in (names, names[:1000]):
        long = tmp_path / "long.safetensors"
        tensors, header = load_file(moved), read_header(moved)
        header["prolora.earlier_moves"] = json.dumps(listed)
        save_file(tensors, long, header)
        started = time.process_time()
        found = prolora.check(long)
        again = move(long, b, c, tmp_path / "out.safetensors")
        assert time.process_time() - started < 2
        assert len(found.moves) <= 65 and len(str(found)) < 6000
        assert len(again["prolora.earlier_moves"]) < 20_000
    assert found.moves[-2].target == "t999"  # the latest are kept


def test_a_check_tells_the_old_base_from_the_one_that_it_was_moved_to(files):
    moved, a, b, _ = files
    old, new = prolora.check(moved, base=a), prolora.check(moved, base=b)
    assert new and new.base_match.moved_to == ""
    assert not old and old.base_match.moved_to == "b.safetensors"
    assert old.to_dict()["base_match"]["moved_to"] == "b.safetensors"
    assert str(old).startswith("⚠") and "have their place, but it was moved to b.safe" in str(old)
