"""Hooks are removed again, and a run ends at the first call that is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prolora.fitting.updates import capture_first_call, keep_hooks


def test_a_run_ends_at_the_first_call_and_gives_its_arguments():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    x = torch.randn(2, 3)
    args, kwargs = capture_first_call(model[1], lambda: (model(x), pytest.fail("ran on")))
    torch.testing.assert_close(args[0], model[0](x))
    assert kwargs == {}
    assert not model[1]._forward_pre_hooks


def test_a_run_without_a_call_gives_none():
    assert capture_first_call(nn.Linear(3, 3), lambda: None) is None


def test_hooks_are_removed_where_the_block_raises():
    module = nn.Linear(3, 3)
    with (
        pytest.raises(RuntimeError, match="inside"),
        keep_hooks([module.register_forward_hook(print)]),
    ):
        raise RuntimeError("inside")
    assert not module._forward_hooks
