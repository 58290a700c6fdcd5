"""A pipeline ends at the first call of its denoiser."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from prolora.errors import ProLoRAError
from prolora.fitting.pipelines.pipeline import Pipeline


def test_a_pipeline_ends_at_its_denoisers_first_call_and_gives_the_arguments():
    model, runs = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), []
    x = torch.randn(2, 3)
    pipeline = SimpleNamespace(denoiser=model[1], name="one", pipe=None)
    pipeline.sample_latents = lambda *_: (model(x), runs.append("ran on"))
    call = Pipeline._capture_call(pipeline, "cat", None)
    torch.testing.assert_close(call.args[0], model[0](x))
    assert call.kwargs == {} and not runs and not model[1]._forward_pre_hooks
    pipeline.sample_latents = lambda *_: None
    with pytest.raises(ProLoRAError, match="one: its NoneType never ran its denoiser"):
        Pipeline._capture_call(pipeline, "cat", None)
