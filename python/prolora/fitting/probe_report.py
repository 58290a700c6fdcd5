"""The numbers of a fit: what was asked, fitted and found."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ..files.jsontext import replace_nonfinite
from . import gate


@dataclass(frozen=True)
class ProbeReport:
    """What a fit asked of both models, and how well it did."""

    rank: float  # of the updates, as asked for
    gate: gate.Gate  # the verdict of the held-out probes
    samples: tuple[int, int] = (0, 0)  # number of samples of the fit, and of the verdict
    images: int = 0  # sampled images that both models were asked about
    modules: int = 0  # number of modules of the target that got an update
    # "copy" where the fit starts from the copied updates (copies outside the blocks do not change),
    # else "zero"
    start: str = "zero"
    # Share of the way from the start to the fit that was gone, less than 1 where the bases
    # disagree; 0 where no fit was made.
    trust: float = 1.0
    start_reason: str = ""  # why that start
    # Share of the wanted change that was reached before every step, on its probes
    steps: list[float] = field(default_factory=list)
    # Module of the LoRA -> why it was not moved
    left_out: dict[str, str] = field(default_factory=dict)
    resumed: int = 0  # 1 where the fit was read back from the folder of an earlier one
    seconds: dict[str, float] = field(default_factory=dict)  # wall time by stage
    # The lowest and highest log-SNR at which both models were asked
    log_snr: tuple[float, float] = (-math.inf, math.inf)
    shared: bool = False  # both denoise the same latents, so that images need not cross as pixels
    pairs: bool = False  # half of the fit followed pairs of images, with the LoRA and without
    # That the source was asked with, since the target is run without; 1 is none
    guidance: float = 1.0
    look: float = 0.0  # the share of the source's look that was wanted
    derived_prompts: tuple[str, ...] = ()  # made from the LoRA's header, where none were given
    not_drawn: str = ""  # why the page has no images, where they were asked for

    def sentences(self) -> list[str]:
        """Writes the result in plain sentences."""
        lines = [self._describe_fit()]
        low, high = self.log_snr
        lowest = "noise alone" if math.isinf(low) else f"{low:.1f}"
        about = f"Both models were asked about {self.images} sampled images"
        how = "with the same noise" if self.shared else "which crossed as pixels"
        lines.append(f"{about}, {how}, at equal log-SNR from {lowest} to {high:.1f}.")
        if self.derived_prompts:
            lines.append(
                f"No prompts were given; {len(self.derived_prompts)} were made of the words that "
                "the LoRA was trained with, as far as its header has them, and of everyday scenes: "
                f"{'; '.join(self.derived_prompts[:4])}; ..."
            )
        if self.guidance != 1:
            lines.append(
                "The target is run without guidance, so the source was asked with its own, "
                f"{self.guidance:.3g}."
            )
        if self.look:
            lines.append(
                f"{self.look:.0%} of what the two models draw differently was wanted of the target "
                "as well, so it loses that much of its own look."
            )
        if self.left_out:
            name, reason = next(iter(self.left_out.items()))
            verb = "was" if len(self.left_out) == 1 else "were"
            count = _count(len(self.left_out), "module")
            lines.append(f"{count} {verb} not moved; {name}: {reason}.")
        if self.not_drawn:
            lines.append(f"No images could be drawn for the page; {self.not_drawn}.")
        copied = self.gate.decision == gate.COPY
        strength = self.gate.copy_strength if copied else self.gate.strength
        lines.append(f"{self.gate.decision}, at strength {strength:g}: {self.gate.reason}.")
        if strength > 1:
            lines.append(
                f"The file holds {strength:g} times what was fitted, as a fit from nothing is too "
                "weak; the share is that of the fit as it was. Load it at 1, and at less where "
                "images suffer."
            )
        return lines

    def _describe_fit(self) -> str:
        if not self.trust:
            return f"The copied updates are kept, and nothing is fitted: {self.start_reason}."
        how = f" in {_count(len(self.steps), 'step')}" if self.steps else ""
        drawn = _count(self.samples[0], "sample")
        line = f"{_count(self.modules, 'module')} fitted{how} on {drawn}"
        if self.start == "copy":
            line += f", starting from the copied updates ({self.start_reason})"
            if self.trust < 1:
                line += f" and going {self.trust:.0%} of the way, as the bases differ"
        elif self.start_reason:
            line += f", starting from zero ({self.start_reason})"
        return f"{line}."

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields and the sentences ("summary"), ready for JSON."""
        return replace_nonfinite(asdict(self) | {"summary": self.sentences()})  # type: ignore[no-any-return]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
