"""A transfer inside the caller's autocast is the transfer outside it."""

import pytest
import torch
from lora_files import same_bits
from mini import BLOCK, MODULES, write_case
from safetensors.torch import load_file

import prolora


@pytest.mark.parametrize("options", [{"method": "prolora"}, {"match": "similarity"}], ids=str)
def test_autocast_changes_no_bit_of_a_result(tmp_path, options):
    bases = lora, source, target = write_case(tmp_path)
    plain = prolora.transfer(*bases, **options)
    with torch.autocast("cpu", torch.bfloat16):
        found = prolora.transfer(*bases, **options)
        plan = prolora.transfer(*bases, **options, dry_run=True).report
        tensors = found.state_dict()
        (many,) = prolora.transfer_many([lora], source, target, tmp_path / "out", **options)
    assert same_bits(tensors, plain.state_dict())
    assert found.report.totals == plain.report.totals == many.report.totals
    assert plan.totals["mapped"] == plain.report.totals["mapped"]


def test_the_callers_default_device_changes_no_bit_of_a_result(tmp_path):
    """The meta device stands for a GPU that torch makes tensors on by default."""
    lora, source, target = write_case(tmp_path)
    options = [{"method": "prolora", "out_rank": "50%"}, {"match": "similarity", "out_rank": 0.9}]
    plain = [prolora.transfer(lora, source, target, **each).state_dict() for each in options]
    with torch.device("meta"):
        assert not prolora.check(lora).reason
        assert prolora.open_base(source).read(BLOCK.format(0, MODULES[0])).device.type == "cpu"
        for each, wanted in zip(options, plain, strict=True):
            out = tmp_path / "out.safetensors"
            prolora.transfer(lora, source, target, out=out, overwrite=True, **each)
            assert same_bits(load_file(out, device="cpu"), wanted)
        assert prolora.transfer(lora, source, target, dry_run=True).report.totals["mapped"]
        assert prolora.check(lora, source=source, target=target).move
        (moved,) = prolora.migrate(lora, source, target, tmp_path / "migrated")
        assert torch.empty(1).device.type == "meta"
    assert moved.status == "moved"
