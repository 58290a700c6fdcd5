"""What samples say of a moved LoRA, beside its loss: a judge reads them.

The judge (`judge.py`) learnt real pictures of the world's sets and never saw a sample. All rows
have the same prompts and noises. A share is 0 for the target alone and 1 for what the LoRA that was
trained on the target draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from icons.drawing import STYLES
from judge import Judge, mmd
from results import Row
from tables import format_table
from torch import Tensor
from worlds import World

IMAGES = 64
ALIKE = {"mmd": 0.02, "palette": 0.08}
"""Score -> difference of two sets of samples that is too near to chance for a scale."""
SHADES = 4
"""Steps of each channel in a histogram of colours."""


def score_drawn(
    world: World,
    judge: Judge,
    adapter: str,
    draw: Callable[[str, Tensor, int], Tensor],
    rows: tuple[str, ...],
) -> dict[str, dict[str, float]]:
    """Row -> scores of its samples.

    Args:
        world: has the prompts of the adapter.
        judge: reads what is drawn.
        adapter: the LoRA.
        draw: (row, prompts, seed) -> pixels [n, c, h, w] from −1 to 1.
        rows: what to score; "none" and "oracle" must be among them.

    Returns:
        *named*: the share of samples in which the judge sees what was asked for. *style*: in which
        it sees the LoRA's style, if it knows that. *mmd*: squared distance of the judge's features
        to samples of the oracle from other noise. *palette*: total variation between the colours of
        both. *pixels*: root mean square of the difference from the oracle's image of that noise.
    """
    y = world.sample_prompts(adapter, IMAGES)
    reference = draw("oracle", y, 1)
    wanted, colours, twin = judge(reference)[0], count_colours(reference), draw("oracle", y, 0)
    known = ["plain", *STYLES]
    scores = {}
    for row in rows:
        images = draw(row, y, 0)
        features, content, style, _ = judge(images)
        scores[row] = {
            "named": float((content.argmax(1) == world.content(y)).float().mean()),
            "mmd": mmd(features, wanted),
            "palette": float((count_colours(images) - colours).abs().sum() / 2),
            "pixels": float((images - twin).square().mean((1, 2, 3)).sqrt().mean()),
        }
        if adapter in known:
            right = style.argmax(1) == known.index(adapter)
            scores[row]["style"] = float(right.float().mean())
    return scores


def count_colours(images: Tensor) -> Tensor:
    """Shares of the pixels of all images in SHADES³ boxes of colours."""
    steps = ((images.clamp(-1, 1) + 1) * (SHADES / 2)).long().clamp(max=SHADES - 1)
    box = (steps[:, 0] * SHADES + steps[:, 1]) * SHADES + steps[:, 2]
    return torch.bincount(box.flatten(), minlength=SHADES**3).float() / box.numel()


def share_of(scores: Mapping[str, Mapping[str, float]], row: str, score: str) -> float | None:
    """0 for the target alone, 1 for the LoRA that was trained there; None where these are alike."""
    none, best = scores["none"][score], scores["oracle"][score]
    return (scores[row][score] - none) / (best - none) if abs(best - none) > ALIKE[score] else None


def samples_table(rows: list[Row], place: Callable[[Row], str], titles: Mapping[str, str]) -> str:
    """A line for each LoRA and row in titles: by loss, what is seen, the shares of its samples.

    Seen is the concept, or the style: in how many samples, and with the trained LoRA, of the source
    with its own, and of the target alone. Numbers are means over the rows of one place. LoRAs that
    the judge cannot see are left out.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((place(row), row["adapter"]), []).append(row)
    lines = []
    for (where, adapter), part in groups.items():
        seen = {"concept": "named"}.get(adapter, "style")
        scores = [row["drawn"] for row in part]
        if seen not in scores[0]["oracle"]:
            continue
        for name in [name for name in titles if all(name in one for one in scores)]:
            at = name.removeprefix("fit @ ") if name not in ("fit", "moved") else "1"
            losses = [row.get("copy" if name == "copy" else f"score_at_{at}") for row in part]
            looks = [
                format_mean([one[which].get(seen) for one in scores])
                for which in (name, "oracle", "source", "none")
            ]
            cells = [format_mean([share_of(one, name, score) for one in scores]) for score in ALIKE]
            line = [f"{where}, *{adapter}*", titles[name], format_mean(losses)]
            lines.append([*line, *looks, *cells])
    head = ["target, LoRA", "", "by loss", "seen", "trained there", "source", "alone"]
    return format_table([*head, "features", "colours"], lines)


def format_mean(values: list[float | None]) -> str:
    """Of those that are known, two digits; or a dash."""
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.2f}" if known else "–"
