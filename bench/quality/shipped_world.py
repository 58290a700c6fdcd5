"""The world that examples/icon_family ships: icons of 32 pixels, of every word and set one.

So small models draw them well enough to be looked at, after an hour of one core: what starts from
new weights is trained by Muon, in fewer steps than by AdamW. All else is as in the second world.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from icons.drawing import pictures
from icons_world import BUDGETS, images, judged
from icons_world import WORLD as ICONS

SIZE = 32
draw = partial(pictures, size=SIZE, one_each=True)
WORLD = replace(
    ICONS,
    name="shipped",
    shape=(3, SIZE, SIZE),
    kinds=("pruned", "far", "few-step", "independent"),
    variants=(),
    budgets=BUDGETS | {"source": (8000, 2e-3), "independent": (3500, 2e-3)},
    images=partial(images, draw=draw),
    judged=partial(judged, draw=draw),
    muon=2.5,
)
