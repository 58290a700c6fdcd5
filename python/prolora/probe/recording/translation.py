"""How two models that take different inputs are asked the same question."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from .trajectories import Call, output_of, predict_call

Translate = Callable[[Call], Call]
"""A call recorded on one model -> the call that asks the other the same question."""

Convert = Callable[[Call, Tensor], Tensor]
"""A call of the source and its prediction -> the target's prediction that means the same."""

Read = Callable[[Any], Tensor]
"""A model's return value -> its prediction."""


def same_call(call: Call) -> Call:
    """The call unchanged."""
    return call


def same_prediction(_: Call, prediction: Tensor) -> Tensor:
    """The prediction unchanged."""
    return prediction


@dataclass(frozen=True)
class Guidance:
    """The guidance that the source is asked with, for targets that are run without any.

    Few-step students, and students that learnt their guidance, are run without any: what they
    predict is their teacher's v = u + g·(c − u), with c for the prompt and u for none. So the
    change that they should make is that of the guided prediction, and the change of c alone is too
    small by a factor of about g.

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
    keep_prompted: Callable[[Call], Call | None] = same_call
    adapted: bool = True


PAIR = "pair"
"""Origin of a question about two images, drawn by the source without and with its LoRA."""


@dataclass(frozen=True)
class Question:
    """One question at one point of a trajectory, as each model is asked it.

    Attributes:
        source: the call of the source; of a PAIR, that of the target about the image without the
            LoRA, with the same noise.
        target: the call of the target; the very same where both take the same inputs. Of a PAIR, it
            is about the image with the LoRA.
    """

    source: Call
    target: Call

    @property
    def origin(self) -> str:
        """Where it comes from: "source", "adapted", "target", "pair"; "mixed" for several."""
        return self.source.origin


@dataclass(frozen=True)
class Translation:
    """Turns the calls and predictions of one model into those of the other.

    Each function is the identity by default: both models take the same inputs and predict the same
    quantity. The number of samples in a call must not change, since updates are fitted sample by
    sample.

    Attributes:
        translate: a call recorded on the source -> the call of the target.
        translate_back: a call recorded on the target -> the call of the source.
        convert: the source's call and prediction -> the prediction in the target's terms. The
            target should change by the differences of converted predictions.
        read: return value of either model -> its prediction.
        clip: a recorded call -> the one that is asked, where a model cannot answer or understand
            the recorded one; its origin says which model recorded it.
        guidance: of the source's answers, where the target needs none itself; None: no guidance.
        adapt: a call of the source -> the one that it is asked with its LoRA, where that changes
            the text embeddings, too.
        unadapt: the inverse, for calls recorded with the LoRA.
        find_prompts: a call of the source -> which of its samples have a prompt; None: not known.
    """

    translate: Translate = same_call
    translate_back: Translate = same_call
    convert: Convert = same_prediction
    read: Read = output_of
    clip: Translate = same_call
    guidance: Guidance | None = None
    adapt: Translate = same_call
    unadapt: Translate = same_call
    find_prompts: Callable[[Call], list[bool]] | None = None

    def keep_prompted(self, calls: Iterable[Call]) -> list[Call]:
        """Recorded calls; of a source that is asked with guidance, the samples with a prompt.

        Where an origin has none, its images were drawn from the empty prompt, and are kept.
        """
        if self.guidance is None:
            return list(calls)
        kept = []
        for origin, recorded in itertools.groupby(calls, lambda call: call.origin):
            every = list(recorded)
            prompted = every if origin == "target" else map(self.guidance.keep_prompted, every)
            kept += [replace(c, origin=origin) for c in prompted if c is not None] or every
        return kept

    def question(self, call: Call) -> Question:
        """The question that a recorded call asks; its origin says which model recorded it."""
        call = replace(self.clip(call), origin=call.origin)
        if call.origin == "target":
            return Question(replace(self.translate_back(call), origin=call.origin), call)
        return Question(call, replace(self.translate(call), origin=call.origin))

    def of_source(self, model: nn.Module, question: Question, adapted: bool = False) -> Tensor:
        """The prediction of the source, in the target's terms; arguments as in `ask_source`."""
        answer = self.ask_source(model, question.source, self.read, adapted)
        return self.convert(question.source, answer)

    def ask_source(self, model: nn.Module, call: Call, read: Read, adapted: bool = False) -> Tensor:
        """The prediction of the source at a call of it, guided where it is to be.

        Args:
            model: the source.
            call: of it.
            read: its return value -> its prediction.
            adapted: whether the LoRA is in its weights.
        """
        adapt = self.adapt if adapted else same_call
        prediction = predict_call(model, adapt(call), read)
        if self.guidance is None or (adapted and not self.guidance.adapted):
            return prediction
        free = predict_call(model, adapt(self.guidance.without_prompt(call)), read)
        return free + self.guidance.scale * (prediction - free)

    def of_target(self, model: nn.Module, question: Question) -> Tensor:
        """The prediction of the target."""
        return predict_call(model, question.target, self.read)

    @property
    def same_noise(self) -> bool:
        """Whether both models are asked with the same noise, so that their predictions compare."""
        return True

    def of_clean(self, call: Call) -> Tensor:
        """The prediction of the target that means the x₀ that a call of it was made from."""
        raise RuntimeError("only calls that were made from images know them")

    def image_of_change(self, call: Call, change: Tensor) -> Tensor | None:
        """The change of x₀ that a change of the target's prediction means, as an image.

        It is [n, c, h, w]; None where the layout of the latents is not known.

        Args:
            call: of the target.
            change: of its prediction [n, ...].
        """
        return None
