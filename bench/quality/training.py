"""Trains the study's base models and adapters. One function makes each kind."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping

import torch
from lessons import Guided, Lesson, Lines, flow_loss, teacher_pairs
from torch import Tensor, nn
from worlds import World, backbone

# isort: split
from train import fit, use_adam

from prolora import LowRank

SAME_START = "same start"
"""The kind that starts from the weights that the source started from, and sees other batches."""
APART = ("independent", SAME_START)
SOURCE_START = 1000
"""The seed of the source's weights."""


def train_base(
    world: World, arch: str, kind: str, seed: int, source: nn.Module | None
) -> nn.Module:
    """A base model: the source itself, or one of the kinds of target that are trained."""
    # Of those that are trained apart seed 0 would otherwise be the source again.
    start = 1000 * (1 + (kind in APART)) + seed
    torch.manual_seed(SOURCE_START if kind == SAME_START else start)
    model = world.new_model(arch, kind)
    teaches = kind == "source" and arch == world.teaches_words
    if world.teaches_words and teaches:
        model.text_encoder.requires_grad_(True)
    elif world.teaches_words:
        model.text_encoder.load_state_dict(source.text_encoder.state_dict())
    if kind not in world.fresh:
        start_from(world, arch, kind, model, source)
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = base_lesson(world, kind, seed, model, source)
    optimise = use_adam
    if world.muon and kind in world.fresh:
        optimise = functools.partial(use_muon, backbone(model), world.muon)
    fit(parameters, loss, *world.budgets[kind], seed=1000 + start, optimise=optimise)
    return model.eval()


def use_muon(
    inner: nn.Module, times: float, parameters: list[nn.Parameter], rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, at so many times the rate; AdamW for all else."""
    blocks = dict(inner.named_parameters())
    matrices = [p for name, p in blocks.items() if "blocks." in name and p.dim() == 2]
    numbers = set(map(id, matrices))
    rest = [p for p in parameters if id(p) not in numbers]
    muon = torch.optim.Muon(
        matrices, times * rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, *use_adam(rest, rate)]


def start_from(world: World, arch: str, kind: str, model: nn.Module, source: nn.Module) -> None:
    """Gives a model the source's weights, and zeros where a new block speaks."""
    old, inner = backbone(source).state_dict(), backbone(model)
    weights = {}
    for name in inner.state_dict():
        weight = old[world.origin(arch, kind, name)]
        weights[name] = weight * 0 if world.is_silent(arch, kind, name) else weight
    inner.load_state_dict(weights)


def base_lesson(world: World, kind: str, seed: int, model: nn.Module, source: nn.Module | None):
    """The loss that a kind of base is trained by."""
    way = world.distilled.get(kind)
    if way == "lines":
        pairs = teacher_pairs(world, source, world.student_pairs, 7000 + seed, world.guidance)
        return Lines(world, pairs).loss(model)
    data = world.images(kind, None, "train")
    if way == "guided":
        return Guided(world, data, source).loss(model)
    return flow_loss(world, model, data, source if kind in world.imitating else None)


def train_lora(
    world: World, arch: str, adapter: str, seed: int, model: nn.Module, lesson: Lesson
) -> dict[str, LowRank]:
    """An adapter on one base; on a target it is the oracle."""
    model, inner = insert_lora(world, arch, adapter, seed, model)
    trained = [p for p in model.parameters() if p.requires_grad]
    fit(trained, lesson.loss(model), *world.budgets["lora"], 5000 + seed)
    return read_factors(inner)


def insert_lora(
    world: World,
    arch: str,
    adapter: str,
    seed: int,
    model: nn.Module,
    start: Mapping[str, LowRank] | None = None,
) -> tuple[nn.Module, nn.Module]:
    """A copy of a model whose LoRA alone is trained, from nothing or from updates; its backbone."""
    from peft import LoraConfig

    model = copy.deepcopy(model).requires_grad_(False)
    torch.manual_seed(3000 + seed)
    inner = backbone(model)
    rank = max(u.rank for u in start.values()) if start else world.ranks[adapter]
    inner.add_adapter(LoraConfig(target_modules=world.adapted[arch], r=rank, lora_alpha=rank))
    for name, update in (start or {}).items():
        layer = inner.get_submodule(name)
        for part, factor in ((layer.lora_A, update.down), (layer.lora_B, update.up)):
            part["default"].weight.data.copy_(factor)
    return model, inner


def train_factors(
    base: nn.Module,
    modules: str | list[str],
    rank: int,
    seed: int,
    losses: Callable[[nn.Module], Iterator[Tensor]],
    how: tuple[float, int],
) -> dict[str, LowRank]:
    """A LoRA of PEFT on any network.

    `losses` gives a model's loss on each batch; `how` is rate and steps.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3000 + seed)
    config = LoraConfig(target_modules=modules, r=rank, lora_alpha=rank)
    model = get_peft_model(copy.deepcopy(base), config)
    descend([p for p in model.parameters() if p.requires_grad], losses(model), *how)
    return read_factors(model)


def descend(parameters: list[Tensor], losses: Iterator[Tensor], rate: float, steps: int) -> None:
    """AdamW in one cycle; each loss is asked for when the step before it is done."""
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for loss in itertools.islice(losses, steps):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def read_factors(inner: nn.Module) -> dict[str, LowRank]:
    """{module: update} of the LoRA in a model, convolutions as out × in·kh·kw."""
    from peft import get_peft_model_state_dict

    factors = {name: x.detach().clone() for name, x in get_peft_model_state_dict(inner).items()}
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): LowRank(
            factors[key.replace("lora_A", "lora_B")].flatten(1), down.flatten(1)
        )
        for key, down in factors.items()
        if key.endswith(".lora_A.weight")
    }
