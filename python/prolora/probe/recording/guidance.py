"""A source that is asked with its guidance, for targets that are run without any.

Few-step students, and students that learnt their guidance, are run without any: what they predict
is their teacher's v = u + g·(c − u), with c for the prompt and u for none. So the change that they
should make is that of the guided prediction, and the change of c alone is too small by a factor of
about g.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .trajectories import Call


def keep_call(call: Call) -> Call:
    """The call unchanged."""
    return call


@dataclass(frozen=True)
class Guidance:
    """The guidance that the source is asked with.

    Attributes:
        scale: g of v = u + g·(c − u); 1 is none.
        without_prompt: a call of the source -> the same call without its prompt.
        keep_prompted: a call that the source's sampler made -> its samples that have a prompt, None
            where none has: the target never sees the others.
        adapted: whether the source is guided with the LoRA in its weights, too. Few-step LoRAs are
            run without: they have learnt the guidance.
    """

    scale: float
    without_prompt: Callable[[Call], Call]
    keep_prompted: Callable[[Call], Call | None] = keep_call
    adapted: bool = True
