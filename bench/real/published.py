"""LoRAs between networks that others published: ``python bench/real/published.py DATA --out FILE``.

A LoRA makes a network read one thing as another, so that its answer is the network's own to the
other. A loss is the squared error on unseen questions, over that without a LoRA; a share is what is
taken away of it, over what a LoRA takes away that was trained on the target. DATA is what
`fetch.py DATA --published` made. Rows that FILE has are not made again; --table prints them.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "quality"))

# isort: split
from contenders import Case, Updates, judge_bases, make_projection, scale_updates
from crystals import CHGNET, Network, open_network, write_structures
from encoders import RXNFP, Encoder, check_loading, open_encoder, write_sequences
from results import MIN_GAP, RowsFile, format_cell, format_table, interval, round_numbers
from scoring import apply_updates
from training import train_factors

MOVES = {
    "rxnfp, near": ("pretrained", "10k"),
    "rxnfp, far": ("pretrained", "pistachio"),
    "chgnet, far": ("0.3.0", "r2scan"),
    "sapiens, apart": ("heavy", "light"),
    "sapiens, apart, back": ("light", "heavy"),
    "chgnet, apart": ("0.3.0", "0.2.0"),
}
SEEDS, RANK, STEPS, BATCH, RATE = 3, 8, 60, 6, 3e-3
HELD_OUT, STRENGTHS = 32, (0.4, 0.6, 0.8, 1.0)
ENERGIES = (0.8, 0.9, 0.99)
"""Of the singular values that `prolora` keeps of both bases."""
Subject = Encoder | Network


def open_subject(data: Path, name: str) -> Subject:
    return open_network(data, name) if name in CHGNET else open_encoder(data, name)


def choose_questions(data: Path, name: str) -> Any:
    """All that a network is asked about; the first HELD_OUT are no training's."""
    if name in CHGNET:
        return write_structures()
    return write_sequences(data, "rxnfp" if name in RXNFP else "sapiens")


def list_modules(subject: Subject) -> list[str]:
    """The linear layers that a LoRA changes."""
    return [
        name
        for name, module in subject.model.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(subject.adapted, name)
    ]


@functools.cache
def train_lora(data: Path, name: str, idea: str, seed: int) -> Updates:
    """A LoRA of an idea on a network."""
    subject, questions = open_subject(data, name), choose_questions(data, name)[HELD_OUT:]
    generator = torch.Generator().manual_seed(5000 + seed)

    def losses(model: nn.Module) -> Iterator[Tensor]:
        while True:
            first = int(torch.randint(len(questions) - BATCH, (), generator=generator))
            read, meant = subject.ask(idea, questions[first : first + BATCH], generator)
            with torch.no_grad():
                wanted = subject.answer(subject.model, meant)
            yield (subject.answer(model, read) - wanted).square().mean()

    return train_factors(subject.model, list_modules(subject), RANK, seed, losses, (RATE, STEPS))


@torch.no_grad()
def score(subject: Subject, idea: str, questions: Any, updates: Updates) -> float:
    """The squared error on questions."""
    read, meant = subject.ask(idea, questions, torch.Generator().manual_seed(9))
    wanted = subject.answer(subject.model, meant)
    with apply_updates(subject.model, updates):
        return float((subject.answer(subject.model, read) - wanted).square().mean())


def make_row(data: Path, move: str, idea: str, seed: int) -> dict[str, Any]:
    """Moves one LoRA by every method, and scores what becomes of it."""
    names = MOVES[move]
    source, target = (open_subject(data, name) for name in names)
    lora, oracle = (train_lora(data, name, idea, seed) for name in names)
    weights = [
        {name: one.model.get_submodule(name).weight.data for name in list_modules(one)}
        for one in (source, target)
    ]
    shared = {
        name: update
        for name, update in lora.items()
        if name in weights[1] and weights[1][name].shape == weights[0][name].shape
    }
    case = Case(*({name: side[name] for name in shared} for side in weights), shared)
    moved = {f"copy @ {s:g}": scale_updates(shared, s) for s in STRENGTHS}
    moved |= {f"prolora {energy}": make_projection("prolora", energy)(case) for energy in ENERGIES}
    unseen = choose_questions(data, names[1])[:HELD_OUT]
    none = score(target, idea, unseen, {})
    losses = {
        label: score(target, idea, unseen, updates) / none for label, updates in moved.items()
    }
    best, verdict = score(target, idea, unseen, oracle) / none, judge_bases(case)
    own = score(source, idea, unseen, lora) / score(source, idea, unseen, {})
    return {
        "drift": verdict.drift,
        "cosine": verdict.cosine,
        "modules": [len(shared), len(lora)],
        "on the source": own,
        "trained there": best,
        "shares": {label: (1 - loss) / (1 - best) for label, loss in losses.items()},
    }


def print_table(rows: dict[str, Any]) -> None:
    """Shares by move, with 95 % intervals over seeds and ideas."""
    labels = list(dict.fromkeys(label for row in rows.values() for label in row["shares"]))
    lines = {label: [label] for label in labels}
    for move, label in itertools.product(MOVES, labels):
        values = {
            (key.rsplit(" ", 1)[1], key.split(": ")[1].split(",")[0]): row["shares"][label]
            for key, row in rows.items()
            if key.startswith(f"{move}: ")
            and label in row["shares"]
            and row["trained there"] <= 1 - MIN_GAP
        }
        lines[label].append(format_cell(interval(values) if values else None))
    print(format_table(["", *MOVES], [*lines.values()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--moves", nargs="+", choices=MOVES, default=[*MOVES])
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    table = RowsFile(given.out)
    if given.table:
        print_table(table.rows)
        return
    check_loading(given.data)
    for seed, move in itertools.product(range(SEEDS), given.moves):
        for idea in open_subject(given.data, MOVES[move][0]).ideas:
            key = f"{move}: {idea}, seed {seed}"
            if key not in table.rows:
                table.add(key, round_numbers(make_row(given.data, move, idea, seed)))


if __name__ == "__main__":
    main()
