"""Whether `prolora check` tells every family's LoRAs from those of every other, and in what time.

    python bench/check_families.py [--whole] [--json FILE]

One published size of each family, and Chroma Radiance beside Chroma, is a base, as a header without
weights. A LoRA of each, on the attention and feed-forward layers of the first two blocks and the
last of every stack (of all with --whole) and in every format that can be written, is held against
all of them. Right: "fits"
for its own family, "other" for any other. Wrong: the reverse of one of these. All else is
undecided: "in part", "unclear", and "fits several" where the answer for another family says that
the modules are also those of others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from families import linear_shapes, write_hollow_base

from prolora import check, open_base
from prolora.adapters import Adapter
from prolora.adapters.formats.encoding import FORMATS, outline_tensors
from prolora.adapters.lora import Header, Lora
from prolora.adapters.writing import check_format
from prolora.architectures.families import known_families
from prolora.architectures.layouts import load_layout
from prolora.architectures.modules import find_block
from prolora.core.lowrank import LowRank
from prolora.errors import UnsupportedFormat
from prolora.workflow.base_fit import BaseFit

RANK = 16


def select_blocks(names: list[str]) -> list[str]:
    """The modules in the first two blocks and the last of every stack."""
    blocks = {name: block for name in names if (block := find_block(name))}
    last: dict[str, int] = {}
    for block in blocks.values():
        last[block.stack] = max(last.get(block.stack, 0), int(block.number))
    return [n for n, b in blocks.items() if int(b.number) < 2 or int(b.number) == last[b.stack]]


def outline_lora(family: str, layout: str, format: str, whole: bool) -> Lora:
    """The header of a LoRA on what LoRAs are commonly trained on.

    Raises:
        UnsupportedFormat: the format has no names for the family.
    """
    zero, linear = torch.zeros(()), linear_shapes(layout)
    usual = [name for name in load_layout(layout).adapted if name in linear]
    usual = usual if whole else select_blocks(usual)
    updates = {
        name: LowRank(zero.expand(linear[name][0], RANK), zero.expand(RANK, linear[name][1]))
        for name in usual
    }
    adapter = Adapter(updates, family=family)
    check_format(adapter, format)
    tensors = outline_tensors(adapter, format, torch.float16)
    headers = {key: Header(x.dtype, tuple(x.shape)) for key, x in tensors.items()}
    return Lora(f"{layout} as {format}", headers, lambda key: torch.zeros(()), {})


def judge(own: bool, answer: BaseFit) -> str:
    """What an answer is worth."""
    if answer.also and not own:
        return "fits several"
    if answer.answer in ("fits", "other"):
        return "right" if (answer.answer == "fits") == own else "wrong"
    return answer.answer


def main() -> None:
    """Reads the arguments, measures, writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sizes = {family.layouts[0]: family.id for family in known_families().values()}
    sizes |= {"chroma-radiance": "chroma"}
    counts: dict[str, Counter[str]] = {"own": Counter(), "other": Counter()}
    odd: dict[str, list[str]] = {}
    seconds, loras = [], 0
    with tempfile.TemporaryDirectory() as folder:
        bases = {}
        for layout in sizes:
            path = Path(folder) / f"{layout}.safetensors"
            write_hollow_base(path, layout)
            bases[layout] = open_base(path)
        for layout, family in sizes.items():
            for format in FORMATS:
                try:
                    lora = outline_lora(family, layout, format, arguments.whole)
                except UnsupportedFormat:
                    continue
                loras += 1
                for other, base in bases.items():
                    if other != layout and sizes[other] == family:
                        continue  # another size, which is neither its own base nor a foreign one
                    start = time.process_time()
                    answer = check(lora, base=base).fit
                    seconds.append(time.process_time() - start)
                    verdict = judge(other == layout, answer)
                    counts["own" if other == layout else "other"][verdict] += 1
                    if verdict != "right":
                        odd.setdefault(f"{layout} on {other}: {answer.sentence}", []).append(format)
    facts = {
        "whole": arguments.whole,
        "families": len(set(sizes.values())),
        "bases": len(sizes),
        "loras": loras,
        "own_base": dict(counts["own"]),
        "other_base": dict(counts["other"]),
        "cpu_ms_median": round(1000 * statistics.median(seconds), 1),
        "cpu_ms_most": round(1000 * max(seconds), 1),
        "not_right": odd,
    }
    text = json.dumps(facts, indent=1, ensure_ascii=False)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
