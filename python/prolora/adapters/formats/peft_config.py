"""The scale in front of up·down in PEFT's configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import UnsupportedFormat
from ...files.jsontext import parse_json_object
from .peft_patterns import PatternTable

METADATA_KEY = "lora_adapter_metadata"

# Initialisations that leave the base weights as they are; the others subtract the initial up·down
# from them, so that the factors alone are not the update.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")

# PEFT method -> its name for alpha.
_ALPHA_OPTIONS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}

# Anything that makes the update more than scale · up · down.
_UNSUPPORTED = (
    "modules_to_save",
    "fan_in_fan_out",
    "use_qalora",
    "layer_replication",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "target_parameters",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)

# JSON's whole numbers have no end; beyond this one, floating point loses digits.
_NUMBER_LIMIT = 2**53


@dataclass(frozen=True)
class PeftScaling:
    """What a PEFT configuration says about ranks and scales."""

    rank_default: float  # `r`
    alpha_default: float  # `lora_alpha`
    ranks: PatternTable  # `rank_pattern`
    alphas: PatternTable  # `alpha_pattern`
    rslora: bool  # scale by 1/√r in place of 1/r
    dora: bool = False  # every module has magnitudes too
    method: str = "lora"  # "lora", "loha" or "lokr"

    def rank(self, name: str) -> int:
        """Returns the rank of a module by its name within the component."""
        return int(self.ranks.get(name, self.rank_default))

    def alpha(self, name: str) -> float:
        """Returns the alpha of a module by its name within the component."""
        return self.alphas.get(name, self.alpha_default)

    def scale(self, name: str) -> float:
        """Returns α/r, or α/√r for rsLoRA."""
        rank = self.rank(name)
        return self.alpha(name) / (math.sqrt(rank) if self.rslora else rank)


def scaling_from_config(config: Mapping[str, Any], where: str) -> PeftScaling:
    """Reads a LoraConfig, LoHaConfig or LoKrConfig as PEFT saves it.

    `config` is the JSON object of adapter_config.json, or of one component in a diffusers file.

    Raises:
        UnsupportedFormat: another method's configuration, or one that asks for more than the scaled
            factors and DoRA's magnitudes.
    """
    method = config.get("peft_type") or "LORA"
    if not isinstance(method, str) or method not in _ALPHA_OPTIONS:
        raise UnsupportedFormat(
            f"{where}: the PEFT method is {method!r:.40}; {', '.join(_ALPHA_OPTIONS)} are read"
        )
    alpha = _ALPHA_OPTIONS[method]
    for option in _UNSUPPORTED:
        if config.get(option):
            raise UnsupportedFormat(
                f"{where}: {option} is set, so the update is more than up·down. "
                "Train the adapter without it, or merge it and extract a plain LoRA (`extract()`)"
            )
    if config.get("bias") not in (None, "none"):
        raise UnsupportedFormat(f'{where}: trains biases; only bias="none" is read')
    init = config.get("init_lora_weights")
    if not any(init is plain or init == plain for plain in _PLAIN_INITS):
        raise UnsupportedFormat(
            f"{where}: init_lora_weights is {init!r:.40}, which changes the base weights. "
            "Let PEFT save it as a plain LoRA (path_initial_model_for_weight_conversion)"
        )
    rank = _check_number(config.get("r", 8), "r", where)
    scaling = PeftScaling(
        rank,
        _check_number(config.get(alpha, 8), alpha, where),
        _read_table(config, "rank_pattern", where),
        _read_table(config, "alpha_pattern", where),
        _read_switch(config, "use_rslora", where),
        _read_switch(config, "use_dora", where),
        method.lower(),
    )
    if any(r < 1 or r != int(r) for r in (rank, *scaling.ranks)):
        raise UnsupportedFormat(f"{where}: a rank of the PEFT configuration is not a whole number")
    return scaling


def scalings_from_metadata(
    metadata: Mapping[str, str], prefixes: set[str], where: str
) -> dict[str, PeftScaling]:
    """Reads the scales in a diffusers file's header, by component prefix ("unet.", "", …).

    Components without an entry of their own are left out.

    Raises:
        UnsupportedFormat: the entry is not a JSON object, is about no component of the file, or
            `scaling_from_config` refuses it.
    """
    text = metadata.get(METADATA_KEY)
    if text is None:
        return {}
    table = parse_json_object(text, f"{where}: {METADATA_KEY}")
    scalings = {}
    for prefix in sorted(prefixes):
        config = {
            key.removeprefix(prefix): value
            for key, value in table.items()
            if key.startswith(prefix) and "." not in key.removeprefix(prefix)
        }
        if config:
            component = prefix.rstrip(".") or "all modules"
            scalings[prefix] = scaling_from_config(
                config, f"{where}: {METADATA_KEY} of {component}"
            )
    if table and not scalings:
        raise UnsupportedFormat(
            f"{where}: {METADATA_KEY} is about {next(iter(table)):.100}, which is not in the file, "
            "so the scale is not known"
        )
    return scalings


def _check_number(value: object, what: str, where: str) -> float:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= _NUMBER_LIMIT:
        raise UnsupportedFormat(f"{where}: {what} is a number of {value.bit_length()} bits")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UnsupportedFormat(f"{where}: {what} is {value!r:.40}, not a number")
    return value


def _read_table(config: Mapping[str, Any], option: str, where: str) -> PatternTable:
    table = config.get(option) or {}
    if not isinstance(table, dict):
        raise UnsupportedFormat(f"{where}: {option} is not a JSON object")
    for pattern, value in table.items():
        _check_number(value, f"the pattern {pattern!r:.100}", where)
    return PatternTable(table, f"{where}: {option}")


def _read_switch(config: Mapping[str, Any], option: str, where: str) -> bool:
    value = config.get(option)
    if not isinstance(value, bool | None):
        raise UnsupportedFormat(f"{where}: {option} is {value!r:.40}, neither true nor false")
    return bool(value)
