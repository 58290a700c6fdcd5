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
    """Returns the call unchanged."""
    return call


def same_prediction(_: Call, prediction: Tensor) -> Tensor:
    """Returns the prediction unchanged."""
    return prediction


@dataclass(frozen=True)
class Guidance:
    """The source's guidance, for targets that run without any.

    Few-step students, and students that learnt their guidance, are run without any: what they
    predict is their teacher's v = u + g·(c − u), with c for the prompt and u for none. So the
    change that they should make is the guided prediction's, and the change of c alone is too small
    by a factor of about g.
    """

    scale: float  # g of v = u + g·(c − u); 1 is none
    # A call of the source -> the same call without its prompt
    without_prompt: Callable[[Call], Call]
    # A call that the source's sampler made -> its samples that have a prompt, None without any: the
    # target never sees the others.
    keep_prompted: Callable[[Call], Call | None] = same_call


PAIR = "pair"
"""Origin of a question about two images, drawn by the source without and with its LoRA."""


@dataclass(frozen=True)
class Question:
    """One question at one point of a trajectory, for each model."""

    # The call of the source; for a PAIR, the target's call about the image without the LoRA, with
    # the same noise.
    source: Call
    # The call of the target; the very same where both take the same inputs. For a PAIR, it is about
    # the image with the LoRA.
    target: Call

    @property
    def origin(self) -> str:
        """Where it comes from: "source", "adapted", "target", "pair"; "mixed" for several."""
        return self.source.origin


@dataclass(frozen=True)
class Translation:
    """A translation of the source's calls and predictions into the target's.

    Each function is the identity by default: both models take the same inputs and predict the same
    quantity. The number of samples in a call must not change, since updates are fitted sample by
    sample.
    """

    translate: Translate = same_call  # a call recorded on the source -> the call of the target
    translate_back: Translate = same_call  # a call recorded on the target -> the call of the source
    # The source's call and prediction -> the prediction in the target's terms. The target should
    # change by the differences of converted predictions.
    convert: Convert = same_prediction
    read: Read = output_of  # return value of either model -> its prediction
    # A recorded call -> the one that is asked, where a model cannot answer or understand the
    # recorded one; its origin says which model recorded it.
    clip: Translate = same_call
    # Of the source's answers, where the target needs none itself; None: no guidance
    guidance: Guidance | None = None
    # A call of the source -> the one that it is asked with its LoRA, where that changes the text
    # embeddings, too.
    adapt: Translate = same_call
    unadapt: Translate = same_call  # the inverse, for calls recorded with the LoRA
    # A call of the source -> which of its samples have a prompt; None: not known
    find_prompts: Callable[[Call], list[bool]] | None = None

    def keep_prompted(self, calls: Iterable[Call]) -> list[Call]:
        """Keeps a guided source's samples with a prompt, and all other calls.

        Where an origin has no prompt, its images were drawn from the empty prompt, and are kept.
        """
        if self.guidance is None:
            return list(calls)
        kept = []
        for origin, recorded in itertools.groupby(calls, lambda call: call.origin):
            every = list(recorded)
            prompted = every if origin == "target" else map(self.guidance.keep_prompted, every)
            kept += [call for call in prompted if call is not None] or every
        return kept

    def question(self, call: Call) -> Question:
        """Turns a recorded call into a question; its origin says which model recorded it."""
        whose: dict[str, Any] = {"origin": call.origin, "trajectories": call.trajectories}
        call = replace(self.clip(call), **whose)
        if call.origin == "target":
            return Question(replace(self.translate_back(call), **whose), call)
        return Question(call, replace(self.translate(call), **whose))

    def of_source(self, model: nn.Module, question: Question, adapted: bool = False) -> Tensor:
        """Returns the source's prediction in the target's terms; arguments as in `ask_source`."""
        answer = self.ask_source(model, question.source, self.read, adapted)
        return self.convert(question.source, answer)

    def ask_source(self, model: nn.Module, call: Call, read: Read, adapted: bool = False) -> Tensor:
        """Returns the source's prediction at a call, guided where it should be.

        `read` takes its return value; `adapted` says that the LoRA is in its weights.
        """
        adapt = self.adapt if adapted else same_call
        prediction = predict_call(model, adapt(call), read)
        if self.guidance is None:
            return prediction
        free = predict_call(model, adapt(self.guidance.without_prompt(call)), read)
        return free + self.guidance.scale * (prediction - free)

    def of_target(self, model: nn.Module, question: Question) -> Tensor:
        """Returns the prediction of the target."""
        return predict_call(model, question.target, self.read)

    @property
    def same_noise(self) -> bool:
        """Whether both models are asked with the same noise, so that their predictions compare."""
        return True

    def of_clean(self, call: Call) -> Tensor:
        """Returns the target's prediction for the x₀ that a call was made from."""
        raise RuntimeError("only calls that were made from images know them")
