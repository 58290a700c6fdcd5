"""Trains the study's base models and adapters. One function makes each kind."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from images import CONCEPT_LABEL, DOMAINS, STYLES, concept, digits, labels_table
from model import noised, predict, sample
from networks import ADAPTED, backbone, new_model, origin
from torch import Tensor, nn
from train import batches, fit

from prolora import LowRank

# Batches of 32 and peak learning rate.
BUDGET = {
    "source": (2400, 2e-3),
    "near": (200, 5e-4),
    "far": (500, 1e-3),
    "pruned": (500, 1e-3),
    "continued": (900, 2e-3),
    "independent": (2000, 2e-3),
    "resized": (1600, 2e-3),
    "inverted": (500, 1e-3),
    "mirrored": (500, 1e-3),
    "far, gentle": (300, 3e-4),
    "near, long": (900, 1e-3),
    "continued, gentle": (900, 5e-4),
    "lora": (200, 3e-3),
}
KINDS = ("near", "far", "pruned", "continued", "independent", "resized")
# More fine-tunes, one seed and one architecture each: the rules made on KINDS are tried on them.
VARIANTS = ("inverted", "mirrored", "far, gentle", "near, long", "continued, gentle")
FRESH = ("source", "independent", "resized")  # start from new weights, the others from the source's
ADAPTERS = ("thick", "slanted", "concept", "fewstep")
RANK = 8
GUIDANCE, TEACHER_STEPS, PAIRS = 2.0, 16, 1024
JUDGED = 320  # held-out images, or held-out teacher pairs, behind every loss

Data = tuple[Tensor, Tensor]
Loss = Callable[[torch.Generator], Tensor]


class Tokens(nn.Module):
    """The frozen label table, called like the mini family's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", labels_table())

    def forward(self, y: Tensor) -> Tensor:
        """(n,) labels -> (n, 4, 64)."""
        return self.table[y]


TOKENS = Tokens()


def flow_loss(model: nn.Module, data: Data, teacher: nn.Module | None = None) -> Loss:
    """The rectified-flow loss on images and labels; with a teacher, its output is learnt too."""

    def loss(generator: torch.Generator) -> Tensor:
        clean, labels = batches(*data, generator)
        xt, t, velocity = noised(clean, generator)
        tokens = TOKENS(labels)
        output = predict(model, xt, t, tokens)
        if teacher is None:
            return F.mse_loss(output, velocity)
        with torch.no_grad():
            wanted = predict(teacher, xt, t, tokens)
        return F.mse_loss(output, velocity) + F.mse_loss(output, wanted)

    return loss


def train_base(arch: str, kind: str, seed: int, source: nn.Module | None) -> nn.Module:
    """A base model: the source itself, or one of the kinds of target.

    Args:
        arch: "unet" or "flux".
        kind: "source", or one of KINDS or VARIANTS.
        seed: of its batches, and of its weights where it starts anew.
        source: the source model; None only for the source.
    """
    start = 1000 * (1 + (kind == "independent")) + seed  # else its seed 0 would be the source again
    torch.manual_seed(start)
    model = new_model(arch, kind)
    if kind not in FRESH:
        old = backbone(source).state_dict()
        names = backbone(model).state_dict()
        backbone(model).load_state_dict({name: old[origin(arch, kind, name)] for name in names})
    x, y = digits("train")
    teacher = source if kind == "pruned" else None
    loss = flow_loss(model, (DOMAINS[kind](x), y), teacher)
    fit(list(model.parameters()), loss, *BUDGET[kind], seed=1000 + start)
    return model.eval()


def task_data(kind: str, adapter: str, split: str) -> Data:
    """Images (n, 1, 16, 16) and labels (n,) that a style or concept adapter is about."""
    x, y = digits(split)
    if adapter == "concept":
        n = len(x)
        return DOMAINS[kind](concept(n, seed=7 if split == "train" else 8)), torch.full(
            (n,), CONCEPT_LABEL
        )
    return DOMAINS[kind](STYLES[adapter](x)), y


def teacher_pairs(model: nn.Module, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, the image the model samples from it in 16 guided steps, and the label.

    A few-step adapter learns the straight line between the two (reflow), guidance included.
    """
    y = torch.randint(10, (n,), generator=torch.Generator().manual_seed(seed))
    noise = torch.randn(n, 1, 16, 16, generator=torch.Generator().manual_seed(seed))
    image = sample(model, TOKENS, y, steps=TEACHER_STEPS, guidance=GUIDANCE, seed=seed)
    return noise, image, y


def line_loss(
    model: nn.Module, pairs: tuple[Tensor, Tensor, Tensor], generator: torch.Generator, rows: Tensor
) -> Tensor:
    """Squared error of the velocity along the straight lines of the given pairs."""
    noise, image, y = (part[rows] for part in pairs)
    t = torch.rand(len(rows), generator=generator)
    s = t[:, None, None, None]
    output = predict(model, (1 - s) * image + s * noise, t, TOKENS(y))
    return F.mse_loss(output, noise - image)


def adapter_loss(kind: str, adapter: str, model: nn.Module, pairs: tuple | None) -> Loss:
    """What an adapter is trained to minimise on a base of that kind.

    Args:
        kind: of the base, for its image domain.
        adapter: one of ADAPTERS.
        model: the base with what is to be trained.
        pairs: teacher pairs of the plain base, for "fewstep".
    """
    if pairs is not None:

        def along_lines(generator: torch.Generator) -> Tensor:
            rows = torch.randint(PAIRS, (32,), generator=generator)
            return line_loss(model, pairs, generator, rows)

        return along_lines
    if adapter == "concept":
        new, rare = task_data(kind, "concept", "train")
        x, y = digits("train")
        # The usual images are learnt beside it, so that the digits survive (prior preservation).
        kept = flow_loss(model, (DOMAINS[kind](x), y))
        learnt = flow_loss(model, (new, rare))
        return lambda generator: learnt(generator) + 0.3 * kept(generator)
    return flow_loss(model, task_data(kind, adapter, "train"))


def train_lora(arch: str, kind: str, adapter: str, seed: int, model: nn.Module) -> dict:
    """An adapter on one base, trained on that base's own domain; on a target it is the oracle.

    Returns:
        {module: LowRank}, names as in the diffusers model.
    """
    from peft import LoraConfig, get_peft_model_state_dict

    pairs = teacher_pairs(model, PAIRS, seed=4000 + seed) if adapter == "fewstep" else None
    model = copy.deepcopy(model).requires_grad_(False)
    torch.manual_seed(3000 + seed)
    inner = backbone(model)
    inner.add_adapter(LoraConfig(target_modules=ADAPTED[arch], r=RANK, lora_alpha=RANK))
    loss = adapter_loss(kind, adapter, model, pairs)
    fit([p for p in model.parameters() if p.requires_grad], loss, *BUDGET["lora"], 5000 + seed)
    factors = get_peft_model_state_dict(inner)
    return {
        key.removesuffix(".lora_A.weight"): LowRank(
            factors[key.replace("lora_A", "lora_B")].detach().clone(), down.detach().clone()
        )
        for key, down in factors.items()
        if key.endswith(".lora_A.weight")
    }


@torch.no_grad()
def task_loss(model: nn.Module, kind: str, adapter: str, pairs: tuple | None) -> float:
    """Held-out loss of what the adapter is about, on the same times and noises for every model.

    Args:
        model: the base with or without an adapter.
        kind: of the base, for its image domain.
        adapter: one of ADAPTERS.
        pairs: held-out teacher pairs of the plain base, for "fewstep".
    """
    generator = torch.Generator().manual_seed(123)
    if adapter == "fewstep":
        return line_loss(model, pairs, generator, torch.arange(len(pairs[0]))).item()
    x, y = (part[:JUDGED] for part in task_data(kind, adapter, "held_out"))
    xt, t, velocity = noised(x, generator)
    return F.mse_loss(predict(model, xt, t, TOKENS(y)), velocity).item()
