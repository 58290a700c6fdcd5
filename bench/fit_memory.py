"""Peak memory of a fit on a real class: ``python bench/fit_memory.py --width 96 --samples 2``.

The UNet of SD1.5 or of SDXL, of diffusers, with random float16 weights, SD1.5's widths scaled to
--width (320 is the model itself); all linear modules of the transformer blocks get an update.
Prints the peak of the host's resident memory with the model, after one prediction, and after the
fit.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from timing import peak_gib

from prolora.architectures.modules import find_block
from prolora.fitting.models import frozen, in_float32
from prolora.fitting.sides import Call, output_of
from prolora.fitting.solver.joint_fit import JointProblem, fit_jointly
from prolora.fitting.solver.linearisation import ProbeBatch

sys.path.append(str(Path(__file__).parents[1] / "tests/support"))

from published_unets import UNETS


def peak_gigabytes() -> float:
    """Of this process, since it started."""
    return round(peak_gib() * 2**30 / 1e9, 2)


def build(name: str, width: int) -> UNet2DConditionModel:
    """The model in float16, never in float32 as a whole; `width` is that of SD1.5."""
    widths = {"block_out_channels": (width, 2 * width, 4 * width, 4 * width)}
    torch.set_default_dtype(torch.float16)
    model = UNet2DConditionModel(**UNETS[name].config | (widths if name == "sd15" else {}))
    torch.set_default_dtype(torch.float32)
    return model


def list_names(model: torch.nn.Module) -> list[str]:
    """The linear modules of the transformer blocks."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and find_block(name)
    ]


def make_call(model: UNet2DConditionModel, samples: int, pixels: int) -> Call:
    """Random inputs."""
    side = pixels // 8
    x, text = (
        torch.randn(samples, 4, side, side),
        torch.randn(samples, 77, model.config["cross_attention_dim"]),
    )
    kwargs = {}
    if model.config["addition_embed_type"]:
        added = {"text_embeds": torch.randn(samples, 1280), "time_ids": torch.ones(samples, 6)}
        kwargs = {"added_cond_kwargs": added}
    return Call((x, torch.full((samples,), 500.0), text), kwargs)


def make_problem(
    model: UNet2DConditionModel, names: list[str], call: Call, steps: int, rank: int
) -> JointProblem:
    """The fit of a change of a tenth of random numbers."""
    with torch.no_grad():
        plain = output_of(model(*call.args, **call.kwargs))
    probes = [ProbeBatch(call, plain, plain + 0.1 * torch.randn_like(plain))]
    return JointProblem(model, names, output_of, lambda: probes, steps, 1.0, rank)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["sd15", "sdxl"], default="sd15")
    parser.add_argument("--width", type=int, default=96, help="of sd15")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--pixels", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    given = parser.parse_args()
    torch.manual_seed(0)
    model = build(given.model, given.width)
    names = list_names(model)
    call = make_call(model, given.samples, given.pixels)
    result = vars(given) | {
        "weights": sum(p.numel() for p in model.parameters()),
        "fitted": sum(model.get_submodule(n).weight.numel() for n in names),
        "modules": len(names),
        "GB_loaded": peak_gigabytes(),
    }
    with frozen(model), in_float32(model):
        problem = make_problem(model, names, call, given.steps, given.rank)
        result["GB_prediction"] = peak_gigabytes()
        started = time.process_time()
        fit = fit_jointly(problem)
    result |= {
        "GB_fit": peak_gigabytes(),
        "processor_seconds": round(time.process_time() - started, 1),
        "history": [round(share, 3) for share in fit.history],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
