"""Peak memory of a fit on a real class: ``python bench/fit_memory.py --width 96 --samples 2``.

SD1.5's UNet of diffusers with random float16 weights, its widths scaled to --width (320 is the
model itself); all linear modules of the transformer blocks get an update. Prints the peak of the
host's resident memory with the model, after one prediction, and after the fit.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch
from diffusers import UNet2DConditionModel

from prolora.architectures.modules import find_block
from prolora.probe.fitting.joint_fit import JointProblem, fit_jointly
from prolora.probe.fitting.linearisation import ProbeBatch
from prolora.probe.models import frozen
from prolora.probe.precision import in_float32
from prolora.probe.recording.trajectories import Call, output_of


def peak_gigabytes() -> float:
    """Of this process, since it started."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)


def build(width: int) -> UNet2DConditionModel:
    """The model in float16, never in float32 as a whole."""
    torch.set_default_dtype(torch.float16)
    model = UNet2DConditionModel(
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        cross_attention_dim=768,
        attention_head_dim=8,
        sample_size=64,
    )
    torch.set_default_dtype(torch.float32)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--pixels", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    given = parser.parse_args()
    torch.manual_seed(0)
    model = build(given.width)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and find_block(name)
    ]
    side = given.pixels // 8
    x, text = torch.randn(given.samples, 4, side, side), torch.randn(given.samples, 77, 768)
    call = Call((x, torch.full((given.samples,), 500.0), text), {})
    result = vars(given) | {
        "weights": sum(p.numel() for p in model.parameters()),
        "fitted": sum(model.get_submodule(n).weight.numel() for n in names),
        "modules": len(names),
        "GB_loaded": peak_gigabytes(),
    }
    with frozen(model), in_float32(model):
        with torch.no_grad():
            plain = output_of(model(*call.args))
        result["GB_prediction"] = peak_gigabytes()
        probes = [ProbeBatch(call, plain, plain + 0.1 * torch.randn_like(plain))]
        started = time.process_time()
        shape = given.steps, 1.0, given.rank
        fit = fit_jointly(JointProblem(model, names, output_of, lambda: probes, *shape))
    result |= {
        "GB_fit": peak_gigabytes(),
        "processor_seconds": round(time.process_time() - started, 1),
        "history": [round(share, 3) for share in fit.history],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
