"""A LoRA of another base, loaded into a diffusers pipeline."""

from __future__ import annotations

from typing import Any

from ..bases import BaseLike, open_pair
from ..errors import InvalidOption
from ..reports.lora_report import LoraReport
from ..verbs.option_keywords import resolve_options, takes_options
from ..verbs.options import BEST, DEFAULT_OPTIONS, LoraLike, TransferOptions
from .base_pair import BasePair


@takes_options
def load_moved_lora(
    pipe: Any,
    lora: LoraLike,
    source: BaseLike,
    options: TransferOptions = DEFAULT_OPTIONS,
    *,
    adapter_name: str | None = None,
    adapter_weight: float = 1.0,
    **changes: Any,
) -> LoraReport:
    """Moves a LoRA to a pipeline's base, and loads it there.

    It does what `pipe.load_lora_weights` does for a LoRA of this base, without a file. Weights are
    read from the pipeline as they are in memory; LoRAs that are attached already stay attached and
    do not count. As there, the new adapter alone is active then; `pipe.set_adapters` combines
    several.

    Args:
        pipe: a diffusers pipeline with a `unet` or `transformer` and `load_lora_weights`.
        lora: the LoRA of the source base, as `transfer` takes it.
        source: the base it was trained on, as `transfer` takes it.
        options: how to move it.
        adapter_name: as `pipe.set_adapters` will call it; None leaves the name to diffusers.
        adapter_weight: its weight.
        **changes: single options by name; they win over `options`.

    Returns:
        What was kept and lost.

    Raises:
        InvalidOption: the pipeline loads no LoRAs, or method "best".
        ProLoRAError: what `transfer` refuses.
    """
    if not hasattr(pipe, "load_lora_weights"):
        raise InvalidOption(f"{type(pipe).__name__} has no load_lora_weights: it loads no LoRAs")
    options = resolve_options(options, changes)
    if options.method == BEST:
        raise InvalidOption("models in memory take a LoRA by weights alone: auto, copy or prolora")
    done = BasePair.open(*open_pair(source, pipe), options).transfer(lora)
    before = _list_adapters(pipe)
    pipe.load_lora_weights(done.state_dict("diffusers"), adapter_name=adapter_name)
    if adapter_weight != 1:
        (name,) = _list_adapters(pipe) - before
        pipe.set_adapters([name], [adapter_weight])
    return done.report


def _list_adapters(pipe: Any) -> set[str]:
    return {name for names in pipe.get_list_adapters().values() for name in names}
