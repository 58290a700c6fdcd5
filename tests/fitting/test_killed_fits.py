"""A fit that is killed at any moment and run again gives what an uninterrupted one gives."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_pipelines as tiny
import torch
from safetensors.torch import load_file

import prolora

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="a platform without fork"),
]
KILLS = 12
KINDS = {"shared latents": {}, "other latents": {"vae_seed": 3}}


def in_child(work: Callable[[], object], seconds: float | None = None) -> int:
    """Runs the work in a process of its own; kills it after some seconds. Returns its status."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_killed_at_random_moments_ends_in_the_same_bytes(kind, tmp_path):
    torch.set_num_threads(1)
    ends = tiny.save_ends(tmp_path, **KINDS[kind])
    asked = {"images": 2, "steps": 2, "fit_steps": 6, "force": True}

    def fit(name: str, kept: Path | None) -> None:
        done = prolora.fit(*ends, prompts=("cat", "dog"), resume=kept, **asked)
        done.save(tmp_path / name, overwrite=True)

    started = time.monotonic()
    assert in_child(lambda: fit("whole.safetensors", None)) == 0
    whole = time.monotonic() - started
    draw, kept = random.Random(7), tmp_path / "kept"
    killed = 0
    for _ in range(KILLS):
        status = in_child(lambda: fit("pieces.safetensors", kept), draw.uniform(0.05, 1.2) * whole)
        assert status in (0, -signal.SIGKILL)
        killed += status != 0
        # Whatever is there under a name of its own is whole.
        for file in kept.glob("*.safetensors"):
            load_file(file)
    assert killed >= KILLS // 3
    assert in_child(lambda: fit("pieces.safetensors", kept)) == 0
    same = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("whole", "pieces")]
    assert same[0] == same[1]
