"""What a LoRA is, and whether it fits a base: `check`."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.adapter_folder import ADAPTER_FILES
from ..adapters.lora import Lora
from ..architectures.identify import explain_adapter
from ..architectures.loaders import known_loaders
from ..bases.describe import BaseShapes
from ..bases.keys.other_models import explain_other_model
from ..errors import InvalidOption, MissingFile, UnsupportedFormat, suggest
from .check_result import Check
from .defects import Defect, find_faint
from .file_facts import check_model, check_tensors, read_base_shapes

if TYPE_CHECKING:  # torch, which takes a second to import, is needed where a base is read
    from ..bases import BaseLike
    from ..bases.base import Progress
    from ..bases.experts import Experts, ExpertsLike
    from ..moving.base_fit import BaseMatch
    from ..moving.base_pair import BasePair
    from ..verbs.options import LoraLike
    from ..verbs.result import Transfer


def check(
    lora: LoraLike | Transfer,
    *,
    base: ExpertsLike | None = None,
    program: str | None = None,
    deep: bool = False,
    source: BaseLike | None = None,
    target: BaseLike | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Check:
    """Reports what a file is, and whether it is for a base or a program.

    Headers and alphas are read; with `source` and `target` their weights are compared, too, and the
    result says what a transfer would. By
    names and shapes, fine-tunes of one model take each other's LoRAs, and are not told apart.

    Args:
        lora: a .safetensors file, a PEFT folder, an id on the hub, a state dict or the `Transfer`
            that another call returned, judged as the file that `save` writes; a base model is
            described, too.
        base: as `transfer` takes its bases, of a pipeline with two experts the first; or the id of
            a family ("sdxl") or of a published size ("wan2.2-t2v-a14b").
        program: a program that should read it ("comfyui", "diffusers", "forge", …).
        deep: read all tensors, too, and look for NaN, overflows and outliers, and with a `base` for
            updates that are too small to show.
        source: the base that the LoRA was trained on, if `target` is given.
        target: the base that it may move to.
        cache: folder that keeps what is learnt of the two; None keeps nothing.
        progress: called as progress(done, total, name).

    Returns:
        The answer, which is true where nothing speaks against it.

    Raises:
        InvalidOption: an unknown program, or one base of two.
        UnsupportedFormat: a file cannot be read at all, or a base is none.
        ProLoRAError: what `transfer` refuses, but for a LoRA of another model than the source, one
            model as both, and models that have nothing in common: these are answers.
    """
    return CheckRequest(base, program, deep, source, target, cache).check(lora, progress)


@dataclass
class CheckRequest:
    """What is asked of LoRAs; bases in files are opened once for all of them."""

    base: ExpertsLike | Experts | None
    program: str | None
    deep: bool
    source: BaseLike | None
    target: BaseLike | None
    cache: str | os.PathLike[str] | None
    _pair: BasePair | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Refuses an unknown program, and one base of two."""
        name = self.program.lower() if isinstance(self.program, str) else self.program
        self.program = name
        if name is not None and name not in [*known_loaders()]:
            programs, meant = ", ".join(known_loaders()), suggest(str(name), known_loaders())
            raise InvalidOption(f"`program` is one of {programs}, not {name!r}{meant}")
        if (self.source is None) != (self.target is None):
            raise InvalidOption("give `source` and `target`, or `base`: a verdict takes two models")

    def check(self, lora: LoraLike | Transfer, progress: Progress | None) -> Check:
        """Checks one LoRA; see `prolora.check`."""
        opened = open_lora(lora)
        with opened or nullcontext():
            if opened is None:
                assert isinstance(lora, str | os.PathLike)
                result = check_model(lora)
            else:
                result = check_tensors(opened, self.program, self.deep)
            if self.base is self.source is None:
                return result
            if opened is None or result.kind != "lora":
                reason = result.reason or "a whole model; compare a LoRA with it"
                return replace(result, reason=reason)
            if self.base is not None:
                match, faint = self._match_base(opened)
                defects = (*result.defects, *filter(None, [faint]))
                result = replace(result, base_match=match, defects=defects)
            if self.source is not None:
                result = replace(result, move=self._open_pair(opened).judge_move(opened, progress))
        return result

    def _match_base(self, opened: Lora) -> tuple[BaseMatch, Defect | None]:
        """Reports whether a LoRA is for the base or family; of two experts the first decides.

        With `deep` its updates are compared with the base's weights.
        """
        from ..moving import base_fit

        if published := base_fit.find_published(self.base):
            return base_fit.fit_published(opened, published), None
        try:
            from ..bases.experts import open_experts
            from ..moving.lazy_bases import narrow_base
        except ModuleNotFoundError as error:
            if error.name != "torch" or not isinstance(self.base, str | os.PathLike):
                raise
            with Lora.open(self.base) as header:
                return base_fit.fit_shapes(opened, _read_known_base(header)), None
        try:
            self.base = experts = open_experts(narrow_base(self.base, opened))
            base = next(iter(experts.values()))
            match = base_fit.fit_shapes(opened, base)
            return match, find_faint(opened, base) if self.deep and match else None
        except MissingFile as error:
            raise type(error)(f"{error}{base_fit.suggest_published(self.base)}") from error

    def _open_pair(self, opened: Lora) -> BasePair:
        """Opens the two bases for a preview; the next LoRA finds what was learnt of them."""
        if self._pair is None:
            from ..bases import open_base
            from ..moving.base_pair import BasePair
            from ..moving.lazy_bases import narrow_base
            from ..verbs.options import TransferOptions

            old, new = (open_base(narrow_base(x, opened)) for x in (self.source, self.target))
            self._pair = BasePair.open(old, new, TransferOptions(cache=self.cache))
        return self._pair


def _read_known_base(header: Lora) -> BaseShapes:
    """Reads names and shapes of a base without torch; refuses all but a known family's."""
    base, reason = read_base_shapes(header)[0], explain_adapter(header.tensors)
    if not base.model.families:
        reason = reason or explain_other_model(header.tensors) or "is of no family by its header"
    if reason:
        raise UnsupportedFormat(f"{header.where}: {reason}")
    return base


def open_lora(lora: LoraLike | Transfer) -> Lora | None:
    """Opens an adapter; None for what can be nothing but a base model.

    An `Adapter` and a `Transfer` are opened as the file that they are written to.
    """
    if isinstance(lora, str | os.PathLike):
        path = Path(lora)
        others = os.path.isdir(path) and not any((path / name).exists() for name in ADAPTER_FILES)
        if others or path.suffix.lower() == ".gguf":
            return None
    made: Any = lora
    if hasattr(made, "adapter"):  # a Transfer
        return Lora.open(made.state_dict(), made.adapter.metadata)
    if hasattr(made, "updates"):  # an Adapter
        from ..adapters import encode_state_dict

        return Lora.open(encode_state_dict(made), made.metadata)
    return Lora.open(made)
