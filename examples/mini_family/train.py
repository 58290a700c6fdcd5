"""Trains the whole family: ``python train.py [stage ...]``. Finished stages are skipped."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

# isort: split
from data import DOMAINS, STYLES, digits
from lora import TARGETS, save_kohya
from model import NULL_LABEL, Labels, load_unet, new_unet, noised, predict

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"
UNET_FILE = "diffusion_pytorch_model.safetensors"
# What the tests take for an unrelated base: only its attention, in eight bits.
INDEPENDENT = HERE.parents[1] / "tests" / "data" / "independent.safetensors"
WORK = HERE / "work"  # oracle LoRAs and the training times: needed to measure, not stored in git

BATCH = 32
# Batches and peak learning rate.
BUDGET = {
    "source": (4000, 2e-3),
    "finetuned": (1000, 1e-3),
    "pruned": (800, 1e-3),
    "independent": (500, 2e-3),
    "lora": (300, 3e-3),
}
LORAS = {"thick": {"r": 8, "lora_alpha": 8}, "slanted": {"r": 8, "lora_alpha": 4}}


def use_adam(parameters: list[nn.Parameter], rate: float) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters."""
    return [torch.optim.AdamW(parameters, rate, weight_decay=0.0, fused=True)]


def fit(
    parameters: list[nn.Parameter],
    loss: Callable[[torch.Generator], Tensor],
    steps: int,
    rate: float,
    seed: int,
    optimise: Callable[[list[nn.Parameter], float], list[torch.optim.Optimizer]] = use_adam,
) -> None:
    """Minimises a loss and leaves the averaged weights in the parameters."""
    generator = torch.Generator().manual_seed(seed)
    optimizers = optimise(parameters, rate)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: min(1.0, (i + 1) / 50) * max(0.02, 1 - i / steps)
        )
        for optimizer in optimizers
    ]
    # An average over roughly the last twentieth of the run: far cleaner samples than the last step.
    average, decay = [p.detach().clone() for p in parameters], 1 - 20 / steps
    start = time.perf_counter()
    for i in range(steps):
        value = loss(generator)
        for optimizer in optimizers:
            optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(decay, i / (i + 9)))
        if i % 100 == 0:
            seconds = time.perf_counter() - start
            print(f"  step {i:5d} of {steps}  loss {value.item():.4f}  {seconds:.0f} s", flush=True)
    for p, mean in zip(parameters, average, strict=True):
        p.data.copy_(mean)


def batches(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One random batch, a tenth of its labels hidden for classifier-free guidance."""
    rows = torch.randint(len(x), (BATCH,), generator=generator)
    hidden = torch.rand(BATCH, generator=generator) < 0.1
    return x[rows], torch.where(hidden, NULL_LABEL, y[rows])


def task_loss(unet: nn.Module, labels: Labels, x: Tensor, y: Tensor) -> Callable:
    """The rectified-flow loss on (n, 1, 16, 16) images with (n,) labels."""

    def loss(generator: torch.Generator) -> Tensor:
        clean, classes = batches(x, y, generator)
        xt, t, velocity = noised(clean, generator)
        return F.mse_loss(predict(unet, xt, t, labels(classes)), velocity)

    return loss


def save_unet(unet: nn.Module, member: str) -> None:
    """Stores a member the way diffusers does, in half precision."""
    unet.half().save_pretrained(WEIGHTS / member)


def train_source() -> None:
    """The base model and, with it, the label table."""
    torch.manual_seed(0)
    unet, labels = new_unet("source"), Labels()
    parameters = [*unet.parameters(), *labels.parameters()]
    fit(parameters, task_loss(unet, labels, *digits("train")), *BUDGET["source"], seed=1)
    save_unet(unet, "source")
    save_file({"table": labels.table.detach().half()}, WEIGHTS / "labels.safetensors")


def train_finetuned() -> None:
    """The source continued on digits in front of a backdrop."""
    # A new UNet, because the config of a loaded one would store the folder it came from.
    unet, labels = new_unet("finetuned"), Labels.load(WEIGHTS / "labels.safetensors")
    unet.load_state_dict(load_unet(WEIGHTS / "source").state_dict())
    x, y = digits("train")
    loss = task_loss(unet, labels, DOMAINS["finetuned"](x), y)
    fit(list(unet.parameters()), loss, *BUDGET["finetuned"], seed=2)
    save_unet(unet, "finetuned")


def train_pruned() -> None:
    """Fewer transformer blocks, started from the source's first ones and distilled from it."""
    teacher, labels = load_unet(WEIGHTS / "source"), Labels.load(WEIGHTS / "labels.safetensors")
    teacher.requires_grad_(False)
    unet = new_unet("pruned")
    kept = teacher.state_dict()
    unet.load_state_dict({name: kept[name] for name in unet.state_dict()})
    x, y = digits("train")

    def loss(generator: torch.Generator) -> Tensor:
        clean, classes = batches(x, y, generator)
        xt, t, velocity = noised(clean, generator)
        tokens = labels(classes)
        output = predict(unet, xt, t, tokens)
        return F.mse_loss(output, velocity) + F.mse_loss(output, predict(teacher, xt, t, tokens))

    fit(list(unet.parameters()), loss, *BUDGET["pruned"], seed=3)
    save_unet(unet, "pruned")


def train_independent() -> None:
    """The source's shape, data and labels, but other initial weights: no relative of it."""
    torch.manual_seed(6)
    unet, labels = new_unet("source"), Labels.load(WEIGHTS / "labels.safetensors")
    loss = task_loss(unet, labels, *digits("train"))
    fit(list(unet.parameters()), loss, *BUDGET["independent"], seed=7)
    attention = {
        name: weight.to(torch.float8_e4m3fn)
        for name, weight in unet.state_dict().items()
        if ".attn" in name and weight.ndim == 2
    }
    INDEPENDENT.parent.mkdir(parents=True, exist_ok=True)
    save_file(attention, INDEPENDENT)


def train_lora(member: str, style: str) -> None:
    """A style LoRA on one member, on images of that member's own domain.

    The source's are the family's adapters. Those of the targets are the oracles: what training
    on the target would have reached, the upper end of the scale a transfer is measured on.
    """
    unet, labels = load_unet(WEIGHTS / member), Labels.load(WEIGHTS / "labels.safetensors")
    unet.requires_grad_(False)
    unet.train()
    torch.manual_seed(4)
    unet.add_adapter(LoraConfig(target_modules=TARGETS, **LORAS[style]))
    x, y = digits("train")
    loss = task_loss(unet, labels, DOMAINS[member](STYLES[style](x)), y)
    fit([p for p in unet.parameters() if p.requires_grad], loss, *BUDGET["lora"], seed=5)
    path = lora_path(member, style)
    path.parent.mkdir(parents=True, exist_ok=True)
    # One file in each of the two spellings found in the wild.
    names = "sgm" if style == "thick" else "diffusers"
    alpha = LORAS[style]["lora_alpha"]
    save_kohya(get_peft_model_state_dict(unet), alpha, style, path, names, BUDGET["lora"][0])


def lora_path(member: str, style: str) -> Path:
    """Where the LoRA of a style trained on a member is stored."""
    folder = WEIGHTS / "loras" if member == "source" else WORK / member
    return folder / f"{style}.safetensors"


STAGES: dict[str, tuple[Path, Callable[[], None]]] = {
    "source": (WEIGHTS / "labels.safetensors", train_source),
    "finetuned": (WEIGHTS / "finetuned" / UNET_FILE, train_finetuned),
    "pruned": (WEIGHTS / "pruned" / UNET_FILE, train_pruned),
    "independent": (INDEPENDENT, train_independent),
} | {
    f"{style}-{member}": (lora_path(member, style), lambda m=member, s=style: train_lora(m, s))
    for member in DOMAINS
    for style in STYLES
}


def main() -> None:
    """Runs the stages asked for, or all of them, in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="stage", help=", ".join(STAGES))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    WEIGHTS.mkdir(exist_ok=True)
    WORK.mkdir(exist_ok=True)
    times = WORK / "times.json"
    for stage in options.stages or STAGES:
        done, run = STAGES[stage]
        if done.exists():
            print(f"{stage}: already there", flush=True)
            continue
        print(stage, flush=True)
        start = time.perf_counter()
        run()
        seconds = json.loads(times.read_text()) if times.exists() else {}
        seconds[stage] = round(time.perf_counter() - start)
        times.write_text(json.dumps(seconds, indent=1))


if __name__ == "__main__":
    main()
