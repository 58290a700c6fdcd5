"""AdamW on the factors of a LoRA, as trainers run it: what the steps of a fit are compared with.

OneTrainer's draft of a "delta transfer" (pull request 1353) teaches a LoRA so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from prolora import LowRank
from prolora.probe.fitting.joint_fit import JointFit, JointProblem, start_factors
from prolora.probe.fitting.linearisation import TargetFunction
from prolora.probe.fitting.refinement import STEPS

RATES = {"zero": 3e-3, "copy": 1e-3}
"""Of the first step; it falls linearly to 0. They suit the factors of these networks."""


def fit_by_adamw(
    problem: JointProblem, initial: Mapping[str, LowRank] | None = None, *_: Any
) -> JointFit:
    """STEPS steps of AdamW for every step of the problem."""
    leaves = start_factors(problem, initial or {})
    steps, rate = STEPS * problem.steps, RATES["copy" if initial else "zero"]
    values = [factor for pair in leaves.values() for factor in pair]
    optimiser = torch.optim.AdamW(values, weight_decay=0.0)
    function = TargetFunction(problem.target, problem.read, problem.damping)
    history = []
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * (1 - step / steps)
        # What is cut to a rank at the end is cut in the metric of the last step.
        renew = problem.will_be_cut and step == steps - 1
        point = function.linearise(problem.draw(), leaves, renew=renew)
        history.append(point.reached)
        if point.reached < 1:
            wanted = point.missing / (1 - point.reached)
            slopes = [slope for pair in point.gradient.values() for slope in pair]
            for value, slope in zip(values, slopes, strict=True):
                value.grad = slope.mul_(-2 / wanted)
            optimiser.step()
    metric = function.curvature if problem.will_be_cut else None
    return JointFit({n: LowRank(*pair) for n, pair in leaves.items()}, metric, history)
