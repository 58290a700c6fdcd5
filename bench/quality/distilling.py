"""The ceiling of probing: a LoRA trained on the trajectories that the models sample themselves.

This is training, with an optimiser, a learning rate and its schedule; it is here to compare with.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from contenders import Updates
from scoring import apply_updates
from torch import Tensor, nn
from worlds import backbone

from prolora import LowRank

STEPS, BATCH, RATE = 150, 48, 3e-3

Sample = Callable[[int], None]


def distil_lora(
    source: nn.Module,
    target: nn.Module,
    lora: Updates,
    adapted: str,
    samplers: tuple[Sample, Sample, Sample],
    seed: int,
    rank: int,
) -> tuple[Updates, float]:
    """Trains the target to change its prediction as the LoRA changes the source's.

    Args:
        source: called with (images, times, tokens), as the target.
        target: left as it is.
        lora: of the source, diffusers' names.
        adapted: pattern of the target's modules that get an update.
        samplers: of the source, of the target, of the source with the LoRA.
        seed: of the trajectories.
        rank: of the trained updates.

    Returns:
        The target's updates, and the processor seconds that went into sampling.
    """
    from peft import LoraConfig, get_peft_model_state_dict

    started = time.process_time()
    states = _recorded(source, samplers[0], seed)
    with apply_updates(source, lora):
        states += _recorded(source, samplers[2], seed + 1)
    states += _recorded(target, samplers[1], seed + 2)
    sampling = time.process_time() - started
    x, t, tokens = (torch.cat(parts) for parts in zip(*states, strict=True))
    wanted = _predicted(target, x, t, tokens) - _predicted(source, x, t, tokens)
    with apply_updates(source, lora):
        wanted += _predicted(source, x, t, tokens)

    model = copy.deepcopy(target).requires_grad_(False)
    torch.manual_seed(seed)
    inner = backbone(model)
    inner.add_adapter(LoraConfig(target_modules=adapted, r=rank, lora_alpha=rank))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 10) * (1 - step / STEPS) + 1e-5
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        loss = F.mse_loss(model(x[rows], t[rows], tokens[rows])[0], wanted[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    factors = get_peft_model_state_dict(inner)
    updates = {}
    for key, down in factors.items():
        if key.endswith(".lora_A.weight"):
            up = factors[key.replace("lora_A", "lora_B")]
            name = re.sub(r"\.lora_A\.weight$", "", key)
            updates[name] = LowRank(up.detach().clone(), down.detach().clone())
    return updates, sampling


def _recorded(model: nn.Module, sample: Sample, seed: int) -> list[tuple[Tensor, ...]]:
    """Images, times and tokens of every call that a sampler makes."""
    calls: list[tuple[Tensor, ...]] = []
    hook = model.register_forward_pre_hook(
        lambda _module, args: calls.append(tuple(part.clone() for part in args[:3]))
    )
    sample(seed)
    hook.remove()
    return calls


@torch.no_grad()
def _predicted(model: nn.Module, *inputs: Tensor) -> Tensor:
    parts = (part.split(96) for part in inputs)
    return torch.cat([model(*batch)[0] for batch in zip(*parts, strict=True)])
