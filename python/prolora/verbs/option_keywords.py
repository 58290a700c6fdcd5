"""Options as keywords of the public functions."""

from __future__ import annotations

import functools
import inspect
import os
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..core.validation import resolve_device
from ..errors import InvalidOption, suggest
from ..files.store import check_free
from .option_fields import read_shown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Function = TypeVar("Function", bound=Callable[..., Any])
Options = TypeVar("Options", bound="DataclassInstance")


def resolve_options(options: Options, changes: Mapping[str, Any]) -> Options:
    """Applies changes by keyword (name -> value), and chooses a device if none is asked.

    No process is asked for its devices while options are made, as the default ones are while the
    package is imported.

    Raises:
        InvalidOption: an unknown option, or a value that it does not take.
    """
    names = {taken.name for taken in fields(options)}
    for name in changes:
        if name not in names:
            raise InvalidOption(f"there is no option {name!r}{suggest(name, names)}")
    settled = replace(options, **changes)
    if getattr(settled, "device", "") is None:
        choice: Any = {"device": resolve_device(None)}
        settled = replace(settled, **choice)
    return settled


LORA_ARGUMENTS = {"lora", "loras"}


def _use_results(loras: Any, name: str, out: str | PathLike[str] | None) -> Any:
    """Replaces each `Transfer` by its LoRA, and one path by a list if several LoRAs are taken.

    Raises:
        OutputError: `out` is a file that a `Transfer` was made of.
    """

    def use(lora: Any) -> Any:
        if not hasattr(lora, "adapter"):
            return lora
        if out is not None:
            check_free(out, lora.inputs, overwrite=True, folder=os.path.isdir(out))
        return lora.adapter

    if name == "lora":
        return use(loras)
    if isinstance(loras, str | PathLike) or hasattr(loras, "adapter"):
        return [use(loras)]
    return [use(lora) for lora in loras] if isinstance(loras, list | tuple) else loras


def takes_options(function: Function) -> Function:
    """Adds the help of every option to a function with `options` and `**changes`.

    `help()` and editors then show each keyword with its default and what it does. The options of
    another function are refused before anything else. One path stands for a list of `loras`. A
    `Transfer`, which is what the verbs return, stands for its LoRA.
    """
    signature = inspect.signature(function)
    names = list(signature.parameters)
    default = signature.parameters["options"].default
    place = names.index("options")

    @functools.wraps(function)
    def check_and_call(*args: Any, **keywords: Any) -> Any:
        given = args[place] if len(args) > place else keywords.get("options", default)
        if not isinstance(given, type(default)):
            raise InvalidOption(
                f"{function.__name__}() takes {type(default).__name__}, not "
                f"{getattr(given, '__name__', type(given).__name__)}; each option may also be "
                "given by its name"
            )
        for name in LORA_ARGUMENTS & signature.parameters.keys():
            at, out = names.index(name), keywords.get("out")
            if name in keywords:
                keywords[name] = _use_results(keywords[name], name, out)
            elif at < len(args):
                used = [*args]
                used[at] = _use_results(args[at], name, out)
                args = tuple(used)
        return function(*args, **keywords)

    option_fields = fields(default)
    lines = [
        textwrap.fill(
            f"{field.name}: {read_shown(field).help}",
            width=100,
            initial_indent=" " * 8,
            subsequent_indent=" " * 12,
        )
        for field in option_fields
    ]
    text = function.__doc__ or ""
    check_and_call.__doc__ = text.rstrip() + "\n\n    Options:\n" + "\n".join(lines) + "\n    "
    parameters = [
        p.replace(annotation=p.annotation.replace("LoraLike", "LoraLike | Transfer"))
        for p in signature.parameters.values()
        if p.kind is not p.VAR_KEYWORD
    ]
    taken = {parameter.name for parameter in parameters}
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters += [
        inspect.Parameter(field.name, keyword, default=field.default, annotation=field.type)
        for field in option_fields
        if field.name not in taken
    ]
    shown: Any = check_and_call
    shown.__signature__ = signature.replace(parameters=parameters)
    return cast(Function, shown)
