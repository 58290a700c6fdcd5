"""Blocks that visit the card: the same numbers, and never more of them there than allowed."""

from __future__ import annotations

import contextlib
import weakref

import pytest
import torch
from diagonal import keep_some
from fitting import predict, solve, teach
from lora_files import same_bits
from small_diffusers import MAKERS, make_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prolora import LowRank
from prolora.fitting import swapping, updates
from prolora.fitting.models import in_precision
from prolora.fitting.sides import output_of
from prolora.fitting.solver.joint_fit import JointProblem, start_factors
from prolora.fitting.solver.linearisation import recompute_blocks
from prolora.fitting.swapping import BlockSwapping, name_blocks

CARD = torch.device("cpu")


class Card:
    """Counts the bytes of visiting weights that somebody holds."""

    def __init__(self) -> None:
        self.held = self.most = self.visits = 0

    def bring(self, weight: Tensor, device: torch.device) -> Tensor:
        assert device == CARD
        visiting = weight.clone()
        self.visits += 1
        self.held += visiting.nbytes
        self.most = max(self.most, self.held)
        weakref.finalize(visiting.untyped_storage(), self.leave, visiting.nbytes)
        return visiting

    def leave(self, size: int) -> None:
        self.held -= size


class OnlyBrought(TorchDispatchMode):
    """Fails where an operator reads a weight that is away."""

    def __init__(self, swapping: BlockSwapping) -> None:
        super().__init__()
        weights = (p for name in swapping.away for p in swapping.blocks[name].parameters())
        self.away = {p.untyped_storage().data_ptr() for p in weights}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func is not torch.ops.aten.clone.default:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor) and value.device.type != "meta":
                    assert value.untyped_storage().data_ptr() not in self.away, func
        return func(*args, **(kwargs or {}))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()
    monkeypatch.setattr(swapping, "bring_weight", card.bring)
    return card


def fitted(model: nn.Module, call, bits: str, adam, swapped: BlockSwapping | None = None):
    names = [n for n, _ in model.named_modules() if n.endswith(("to_v", "to_q", "ff.net.2"))]

    def change(plain: Tensor) -> Tensor:
        return 0.1 * torch.randn(plain.shape, generator=torch.Generator().manual_seed(0))

    with in_precision(model, bits):
        probes = teach(model, call, change)
        with OnlyBrought(swapped) if swapped else contextlib.nullcontext():
            return probes[0].plain, solve(model, names, probes, 3, adam=adam)


WAYS = [
    ("float32", torch.float32, False),
    ("float32", torch.float16, False),
    ("bfloat16", torch.bfloat16, False),
    ("float32", torch.float32, True),
]


@pytest.mark.parametrize("way", keep_some(WAYS, WAYS[1]))
@pytest.mark.parametrize("kind", keep_some(MAKERS, "qwen"))
def test_a_fit_with_swapped_blocks_is_the_fit_without_bit_for_bit(card, kind, way):
    bits, stored, adam = way
    ahead = stored != torch.float32
    model, call = make_model(kind)
    model.to(stored)
    plain, fit = fitted(model, call, bits, adam)
    other, call = make_model(kind)
    swapped = BlockSwapping(other.to(stored), CARD)
    room = 2 * max(swapped.sizes.values()) if ahead else 0
    swapped.keep(room)
    assert swapped.away == name_blocks(model) and swapped.ahead is ahead
    before = {name: p for name, p in other.named_parameters()}
    plain2, fit2 = fitted(other, call, bits, adam, swapped)
    assert torch.equal(plain, plain2)
    assert fit.history == fit2.history and fit.history[-1] > 0
    assert same_bits(fit.updates, fit2.updates)
    assert card.visits > len(before) and not card.held
    assert 0 < card.most <= (1 + ahead) * max(swapped.sizes.values())
    for name, parameter in other.named_parameters():
        assert parameter is before[name]


@pytest.mark.parametrize("kind", MAKERS)
def test_as_many_blocks_stay_as_fit_beside_the_largest_that_visits(card, kind):
    model, call = make_model(kind)
    plain = predict(model, call)
    swapped = BlockSwapping(model, CARD)
    sizes = swapped.sizes
    assert sum(sizes.values()) < sum(x.nbytes for x in model.parameters())
    for room in (sum(sizes.values()), sum(sizes.values()) - 1, 2 * max(sizes.values()), 0):
        swapped.keep(room)
        staying = sum(size for name, size in sizes.items() if name not in swapped.away)
        visiting = max((sizes[name] for name in swapped.away), default=0)
        visiting *= min(1 + swapped.ahead, len(swapped.away))
        assert staying + visiting <= max(room, max(sizes.values()))
        assert bool(swapped.away) == (room < sum(sizes.values()))
        card.most = 0
        with OnlyBrought(swapped):
            assert torch.equal(predict(model, call), plain)
        assert card.most <= visiting and (swapped.ahead or card.most == visiting)


class Copied:
    """Notes which block's copies begin and are waited for."""

    def __init__(self, swapped: BlockSwapping) -> None:
        self.swapped, self.log = swapped, []

    def start(self, tensors: list[Tensor]) -> tuple[str, list[Tensor]]:
        first = tensors[0].data_ptr()
        blocks = self.swapped.blocks.items()
        name = next(n for n, b in blocks if next(b.parameters()).data_ptr() == first)
        self.log.append(("begun", name))
        return name, [tensor.clone() for tensor in tensors]

    def finish(self, copies: tuple[str, list[Tensor]]) -> list[Tensor]:
        self.log.append(("there", copies[0]))
        return copies[1]


@pytest.mark.parametrize("kind", ["unet", "flux"])
def test_the_next_block_is_copied_while_one_runs_and_none_twice(kind):
    model, call = make_model(kind)
    swapped = BlockSwapping(model, CARD)
    swapped.keep(2 * max(swapped.sizes.values()))
    copied = swapped._copies = Copied(swapped)
    predict(model, call)  # shows the order, which is not the one of registration in a UNet
    away = [name for what, name in copied.log if what == "there"]
    assert swapped.ahead and len(away) > 2 and sorted(away) == sorted(swapped.away)
    copied.log.clear()
    name = next(n for n, _ in model.named_modules() if n.endswith("to_q"))
    m, n = model.get_submodule(name).weight.shape
    leaves = {name: (torch.ones(m, 1).requires_grad_(), torch.ones(1, n))}
    with recompute_blocks(model), updates.place_factors(model, leaves):
        for order in (away, away[::-1]):
            if order == away:
                made = output_of(model(*call.args, **call.kwargs))
            else:
                made.square().sum().backward()
            begun, there = ([n for what, n in copied.log if what == w] for w in ("begun", "there"))
            assert begun == there == order
            for i, following in enumerate(order[1:]):  # begins when the one before it has come
                assert copied.log.index(("begun", following)) == 2 + 2 * i
            copied.log.clear()


def test_pinned_memory_gives_each_weight_a_part_of_its_own(monkeypatch):
    monkeypatch.setattr(swapping, "_CHUNK", 1000)
    memory = swapping._PinnedMemory(pin=False)
    weights = [torch.randn(n, 3).to(d) for n in (5, 60, 200, 1) for d in (torch.half, torch.float)]
    taken = [memory.take(weight) for weight in weights]
    for weight, there in zip(weights, taken, strict=True):
        assert torch.equal(weight, there) and there.dtype == weight.dtype
        assert there.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()


def test_a_pass_that_fails_inside_a_block_leaves_the_weights_at_rest(card):
    model, call = make_model("flux")
    swapped = BlockSwapping(model, CARD)
    swapped.keep(0)
    kept = dict(model.named_parameters())

    def fail(*_):
        raise KeyError("inside")

    model.transformer_blocks[1].ff.register_forward_hook(fail)
    with pytest.raises(KeyError):
        predict(model, call)
    assert all(parameter is kept[name] for name, parameter in model.named_parameters())
    assert not card.held


def test_factors_beside_swapped_blocks_go_where_these_compute(monkeypatch):
    model, _ = make_model("flux")
    BlockSwapping(model, CARD).keep(0)
    name = "transformer_blocks.0.attn.to_q"
    weight = model.get_submodule(name).weight
    weight.prolora_computes_on = torch.device("meta")  # as on a card
    problem = JointProblem(model, [name], output_of, list, 1, 1.0, 2)
    assert {factor.device.type for factor in start_factors(problem, {})[name]} == {"meta"}
    m, n = weight.shape
    placed = {}

    def look(_, factors):
        placed.update(factors)
        return contextlib.nullcontext()

    monkeypatch.setattr(updates, "place_factors", look)
    with updates.with_lora(model, {name: LowRank(torch.zeros(m, 1), torch.zeros(1, n))}):
        assert {factor.device.type for factor in placed[name]} == {"meta"}
