"""Names of the LoRAs of a merge, and checks before reading."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ..adapters.adapter import Adapter
from ..adapters.lora import Lora
from ..architectures.families import find_title, join_titles, known_families
from ..architectures.identify import Model
from ..bases.experts import HIGH, LOW, find_expert
from ..errors import WrongBase


def name_loras(loras: Sequence[Lora | Adapter]) -> list[str]:
    """Chooses a name for each LoRA: its file without ending, or its number.

    No name occurs twice: files of one name get their folder's before it, then a number.
    """
    paths = [lora.given if isinstance(lora, Lora) else None for lora in loras]
    plain = []
    for i, (path, lora) in enumerate(zip(paths, loras, strict=True), 1):
        stated = lora.metadata.get("ss_output_name") if isinstance(lora, Adapter) else None
        plain.append(path.name.removesuffix(".safetensors") if path else stated or f"LoRA {i}")
    names: list[str] = []
    for path, name in zip(paths, plain, strict=True):
        if path and plain.count(name) > 1 and (folder := path.absolute().parent.name):
            name = f"{folder}/{name}"
        numbered = (f"{name} ({number})" for number in itertools.count(2))
        names.append(next(n for n in itertools.chain([name], numbered) if n not in names))
    return names


def check_families(names: Sequence[str], loras: Sequence[Lora | Adapter]) -> None:
    """Refuses LoRAs of different models.

    Raises:
        WrongBase: names two of them, and what each is for.
    """
    earlier: list[tuple[str, Model]] = []
    for name, lora in zip(names, loras, strict=True):
        model = lora.model
        for other, another in earlier:
            sized = model.families and another.families
            one, two = (x.families if sized else x.able for x in (model, another))
            if one and two and not set(one) & set(two):
                titles, others = (join_titles(map(find_title, ids)) for ids in (one, two))
                how = "is for" if sized else "has names of"
                raise WrongBase(
                    f"{name} {how} {titles}, and {other} {how} {others}: one LoRA belongs to one "
                    "base. Move one of them to the base of the other: `transfer()`, or `fit()`"
                )
        earlier.append((name, model))


def check_experts(names: Sequence[str], loras: Sequence[Lora | Adapter]) -> None:
    """Refuses LoRAs of both experts of one model.

    The base that they are for is among them, if there is one.

    Raises:
        WrongBase: one is for high noise and one for low noise.
    """
    experts = {find_expert(name): name for name in reversed(names)}
    if HIGH not in experts or LOW not in experts:
        return
    families = {id_ for lora in loras for id_ in lora.model.families}
    titles = [one.title for one in known_families().values() if one.id in families and one.experts]
    if titles:
        raise WrongBase(
            f"by their names {experts[HIGH]} is for high noise and {experts[LOW]} for low noise: "
            f"{titles[0]} has an expert for each, and one LoRA belongs to one of them. Merge those "
            "of each expert by themselves, or rename what is for both"
        )
