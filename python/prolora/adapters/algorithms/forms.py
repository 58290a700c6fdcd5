"""Kinds of update in adapter files: their tensors, shapes, ranks and scales.

Everything here follows from shapes alone, so that a file can be judged by its header. What the
tensors multiply to is in `products` and, where the base weights come in, in `dora_oft_glora`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

Shape = tuple[int, ...]

# Larger than any side, and more numbers, than a weight has that LoRAs are trained on. A few small
# factors could otherwise ask for any amount of memory; so it is some hundred times the file.
MAX_SIDE, MAX_NUMBERS = 1 << 18, 1 << 30

ALGORITHM_NAMES = {
    "lora": "LoRA",
    "locon": "LoCon",
    "tucker": "LoCon with a Tucker core",
    "loha": "LoHa",
    "lokr": "LoKr",
    "full": "full difference of weights",
    "glora": "GLoRA",
    "oft": "diag-OFT",
}

NUMBERS = frozenset({"alpha", "scale", "scalar"})
"""Roles of tensors of one number."""

MAGNITUDES = frozenset({"dora_scale", "magnitude"})
"""Roles of the tensors that make an update a DoRA."""

_ROLES = {
    "lora": ({"down", "up"}, {"mid", *NUMBERS, *MAGNITUDES}),
    "loha": (
        {f"hada_w{i}_{side}" for i in (1, 2) for side in "ab"},
        {"hada_t1", "hada_t2", "alpha", "scalar", *MAGNITUDES},
    ),
    "lokr": (
        set(),
        {f"lokr_w{i}{side}" for i in (1, 2) for side in ("", "_a", "_b")}
        | {"lokr_t2", "alpha", "scalar", *MAGNITUDES},
    ),
    "full": ({"diff"}, {"alpha"}),
    "glora": ({"a1", "a2", "b1", "b2"}, {"bm", "alpha", "scalar"}),
    "oft": ({"oft_blocks"}, {"rescale", "alpha"}),
}
_STARTS = {"hada_": "loha", "lokr_": "lokr", "diff": "full", "oft_": "oft"}
_STARTS |= dict.fromkeys(("a1", "a2", "b1", "b2", "bm"), "glora")


@dataclass(frozen=True)
class Form:
    """What the shapes of a module's tensors say."""

    algorithm: str  # a key of `ALGORITHM_NAMES`
    out: int  # rows of ΔW
    inputs: int  # columns of ΔW as a matrix, in·kh·kw; 0 where only the base weight knows
    rank: int  # the rank the file states, which alpha is divided by; 0 for none
    # (kh, kw) of a convolution, (k,) of one along a line, (kt, kh, kw) of one over time
    kernel: Shape | None = None


def kind_of_roles(roles: Set[str]) -> str:
    """Returns the kind of update that tensors of these roles make, "lora" by default."""
    kinds = (
        kind for role in sorted(roles) for start, kind in _STARTS.items() if role.startswith(start)
    )
    return next(kinds, "lora")


def find_missing_role(roles: Set[str]) -> str | None:
    """Returns a needed role that is missing, None if all are present."""
    family = kind_of_roles(roles)
    gone = sorted(_ROLES[family][0] - roles)
    if family == "lokr" and not gone:
        for half in ("lokr_w1", "lokr_w2"):
            factors = {f"{half}_a", f"{half}_b"} & roles
            if half not in roles and len(factors) < 2:
                gone = [half] if not factors else sorted({f"{half}_a", f"{half}_b"} - roles)
                break
    if family == "loha" and len({"hada_t1", "hada_t2"} & roles) == 1:
        gone += sorted({"hada_t1", "hada_t2"} - roles)
    return gone[0] if gone else None


def find_surplus_role(roles: Set[str]) -> str | None:
    """Returns a role that does not go with the others, None if all do."""
    family = kind_of_roles(roles)
    extra = set(roles) - _ROLES[family][0] - _ROLES[family][1]
    if roles >= MAGNITUDES:
        extra = {"magnitude"}
    for half in ("lokr_w1", "lokr_w2"):
        if half in roles:
            extra |= {f"{half}_a", f"{half}_b"} & roles
    if "lokr_w2" in roles:
        extra |= {"lokr_t2"} & roles
    return min(extra) if extra else None


def derive_form(shapes: Mapping[str, Shape]) -> Form | None:
    """Derives an update's form from shapes by role; None if they do not fit."""
    if any(size == 0 for shape in shapes.values() for size in shape):
        return None
    form = _FORMS[kind_of_roles(shapes.keys())](shapes)
    if form is None or not 1 <= form.out <= MAX_SIDE:
        return None
    if form.inputs > min(MAX_SIDE, MAX_NUMBERS // form.out):
        return None
    if "alpha" in shapes and math.prod(shapes["alpha"]) != 1:
        return None
    return form


def _lora_form(shapes: Mapping[str, Shape]) -> Form | None:
    down, up = shapes["down"], shapes["up"]
    core = shapes.get("mid", down)
    fits = {len(down), len(up)} <= {2, len(core)} and 2 + ("mid" in shapes) <= len(core) <= 5
    if not fits or up[1] != core[0] or math.prod(up[2:]) != 1:
        return None
    if "mid" in shapes:
        if core[1] != down[0] or math.prod(down[2:]) != 1:
            return None
        return Form("tucker", up[0], down[1] * math.prod(core[2:]), down[0], core[2:])
    if len(down) == 2:
        return Form("lora", up[0], down[1], down[0])
    algorithm = "lora" if set(down[2:]) == {1} else "locon"
    return Form(algorithm, up[0], math.prod(down[1:]), down[0], down[2:])


def _loha_form(shapes: Mapping[str, Shape]) -> Form | None:
    w1_a, w1_b, w2_a, w2_b = (shapes[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    if any(len(shape) != 2 for shape in (w1_a, w1_b, w2_a, w2_b)):
        return None
    if "hada_t1" not in shapes:
        fits = w1_a[0] == w2_a[0] and w1_b[1] == w2_b[1]
        fits = fits and w1_a[1] == w1_b[0] and w2_a[1] == w2_b[0]
        return Form("loha", w1_a[0], w1_b[1], w1_b[0]) if fits else None
    t1, t2 = shapes["hada_t1"], shapes["hada_t2"]
    fits = 2 < len(t1) <= 5 and t1[2:] == t2[2:]
    fits = fits and (w1_a[1], w1_b[1]) == (w2_a[1], w2_b[1])
    fits = fits and t1[:2] == (w1_a[0], w1_b[0]) and t2[:2] == (w2_a[0], w2_b[0])
    inputs = w1_b[1] * math.prod(t1[2:])
    return Form("loha", w1_a[1], inputs, w1_b[0], t1[2:]) if fits else None


def _lokr_form(shapes: Mapping[str, Shape]) -> Form | None:
    """Derives the form of a LoKr; its rank is the inner size of a factored half."""
    w1 = _whole_or_product(shapes, "lokr_w1")
    w2 = _whole_or_product(shapes, "lokr_w2")
    if w1 is None or w2 is None or len(w1) != 2:
        return None
    if "lokr_w2_b" in shapes:
        rank = shapes["lokr_w2_b"][0]
    else:
        rank = shapes["lokr_w1_b"][0] if "lokr_w1_b" in shapes else 0
    return Form("lokr", w1[0] * w2[0], w1[1] * math.prod(w2[1:]), rank, w2[2:] or None)


def _whole_or_product(shapes: Mapping[str, Shape], half: str) -> Shape | None:
    """Returns the shape of one half of a LoKr: [m, n] or [m, n, …] with a kernel."""
    if half in shapes:
        return shapes[half] if 2 <= len(shapes[half]) <= 5 else None
    a, b, core = shapes[f"{half}_a"], shapes[f"{half}_b"], shapes.get("lokr_t2")
    if len(a) != 2 or not 2 <= len(b) <= 5:
        return None
    if half == "lokr_w2" and core is not None:
        fits = 2 < len(core) <= 5 and len(b) == 2 and core[:2] == (a[0], b[0])
        return (a[1], b[1], *core[2:]) if fits else None
    return (a[0], *b[1:]) if a[1] == b[0] else None


def _difference_form(shapes: Mapping[str, Shape]) -> Form | None:
    diff = shapes["diff"]
    if len(diff) not in (2, 4, 5):
        return None
    return Form("full", diff[0], math.prod(diff[1:]), 0, diff[2:] or None)


def _glora_form(shapes: Mapping[str, Shape]) -> Form | None:
    """Derives GLoRA's form, ΔW = W·a1·a2 + b1·b2; a1, a2 act on input channels."""
    a1, a2, b1, b2 = (shapes[role] for role in ("a1", "a2", "b1", "b2"))
    if any(not 2 <= len(shape) <= 5 for shape in (a1, a2, b1, b2)):
        return None
    fits = a1[1] == a2[0] and a1[0] == a2[1] and math.prod(a1[2:]) == math.prod(a2[2:]) == 1
    product = _lora_form({"up": b1, "down": b2} | ({"mid": shapes["bm"]} if "bm" in shapes else {}))
    if not fits or product is None or product.inputs % a1[0]:
        return None
    return Form("glora", product.out, product.inputs, a2[0], product.kernel)


def _oft_form(shapes: Mapping[str, Shape]) -> Form | None:
    blocks = shapes["oft_blocks"]
    if len(blocks) != 3 or blocks[1] != blocks[2]:
        return None
    out = blocks[0] * blocks[1]
    if "rescale" in shapes and math.prod(shapes["rescale"]) != out:
        return None
    return Form("oft", out, 0, 0)


_FORMS: dict[str, Callable[[Mapping[str, Shape]], Form | None]] = {
    "lora": _lora_form,
    "loha": _loha_form,
    "lokr": _lokr_form,
    "full": _difference_form,
    "glora": _glora_form,
    "oft": _oft_form,
}


def needs_base(roles: Set[str]) -> bool:
    """Returns whether ΔW depends on the base weight."""
    return bool(roles & {*MAGNITUDES, "oft_blocks", "a1"})


def takes_scale(roles: Set[str]) -> bool:
    """Returns whether a tensor `scale` beside these means α/r to every program.

    Beside factors alone it does: for other kinds some programs ignore it, and for a DoRA they
    multiply the whole update by it.
    """
    return {"down", "up"} <= roles and kind_of_roles(roles) == "lora" and not needs_base(roles)


def explain_no_encoder(roles: Set[str]) -> str:
    """Explains why an update is left out whose text encoder the base does not hold."""
    return f"its update is {needs_base_reason(roles)}, and this base holds no such text encoder"


def needs_base_reason(roles: Set[str]) -> str:
    """Explains why, in words that finish "its update is …"."""
    if roles & MAGNITUDES:
        return "rescaled to learned magnitudes (DoRA), which takes the base model's own weight"
    if "oft_blocks" in roles:
        return "a rotation (OFT) of the base model's own weight"
    return "partly a product with the base model's own weight (GLoRA)"
