"""How much of each LoRA every method moves: ``python methods.py`` writes methods.json.

The score is the share of the held-out denoising-loss gap that the transferred LoRA closes: 0 is the
target without any adapter, 1 a LoRA trained on the target (see evaluate.py). One seed per model and
two LoRAs: enough to see that something is off, not to rank methods.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import prolora
from prolora.adapters import Adapter
from prolora.demo import merged
from prolora.linalg.lowrank import LowRank

# isort: split
from data import DOMAINS, STYLES, digits
from evaluate import with_lora
from model import Labels, held_out_loss, load_unet
from train import WEIGHTS, lora_path

HERE = Path(__file__).parent
# Rank rule of each run; None for copy, which looks at no subspace.
RANKS = {
    "prolora": (0.5, 0.8, 0.9, 0.95, 0.99),
    "blocks": (0.5, 0.8, 0.9, 0.95, 0.99),
    "subspace": (0.9,),
    "lora-x": (0.9,),
    "copy": (None,),
}
# The transferred LoRA is also tried weaker, as people do by hand; at the usual rank rule only.
STRENGTHS = (0.4, 0.6, 0.8, 1.0)


def weakened(adapter: Adapter, strength: float) -> Adapter:
    """The adapter with all its updates multiplied by `strength`."""
    updates = {
        name: LowRank(update.up * strength, update.down) for name, update in adapter.updates.items()
    }
    return adapter.with_updates(updates)


def main() -> None:
    """Scores every method on every target and style."""
    labels = Labels.load(WEIGHTS / "labels.safetensors")
    x, y = digits("held_out")
    rows = []
    for member in ("pruned", "finetuned"):
        unet = load_unet(WEIGHTS / member).eval()
        for style, restyle in STYLES.items():
            images = DOMAINS[member](restyle(x))
            none = held_out_loss(unet, labels, images, y)
            oracle = held_out_loss(with_lora(unet, lora_path(member, style))[0], labels, images, y)
            for method, ranks in RANKS.items():
                for rank in ranks:
                    options = {"method": method} | ({"rank": rank} if rank else {})
                    done = prolora.transfer(
                        lora_path("source", style), WEIGHTS / "source", WEIGHTS / member,
                        threshold=0, **options,
                    )  # fmt: skip
                    for strength in STRENGTHS if rank in (0.9, None) else (1.0,):
                        moved = merged(unet, weakened(done.adapter, strength))
                        loss = held_out_loss(moved, labels, images, y)
                        row = {
                            "target": member, "lora": style, "method": method, "rank": rank,
                            "strength": strength,
                            "recovered": round((none - loss) / (none - oracle), 4),
                        }  # fmt: skip
                        rows.append(row)
                        print(row, flush=True)
    line = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(line, stdout=subprocess.PIPE, text=True, cwd=HERE).stdout.strip()
    result = {"commit": commit, "threshold": 0, "rows": rows}
    (HERE / "methods.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
