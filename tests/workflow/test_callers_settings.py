"""A transfer inside the caller's autocast is the transfer outside it."""

import pytest
import torch
from mini import write_case

import prolora


@pytest.mark.parametrize("options", [{}, {"method": "prolora"}, {"match": "similarity"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_no_bit_of_a_result(tmp_path, options, dtype):
    bases = lora, source, target = write_case(tmp_path)
    plain, compared = prolora.transfer(*bases, **options), prolora.compare(source, target)
    with torch.autocast("cpu", dtype):
        found, again = prolora.transfer(*bases, **options), prolora.compare(source, target)
        plan = prolora.plan_report(*bases, **options)
        tensors = found.state_dict()
        (many,) = prolora.transfer_many([lora], source, target, tmp_path / "out", **options)
    wanted = plain.state_dict()
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert found.report.totals == plain.report.totals == many.report.totals
    assert plan.totals["mapped"] == plain.report.totals["mapped"]
    assert again.modules == compared.modules
