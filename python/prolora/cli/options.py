"""The options of the commands: one definition each, in groups that are shown as panels."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import logging
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Optional

import typer
from typer.core import TyperCommand, TyperOption

from ..bases.cache.basis_cache import BasisCache, default_folder
from ..bases.experts import Experts, open_experts
from ..errors import InvalidOption, OutputError
from ..files.hub import spell_path
from ..verbs.option_fields import read_shown
from .flags import FLAGS, JsonOption, base_option, parse_path, path_option

log = logging.getLogger(__name__)


def _derive_parameter(field: dataclasses.Field[Any], hint: Any) -> list[inspect.Parameter]:
    """Derives the parameter of an option that an options object tells; none without a panel."""
    shown = read_shown(field)
    if not shown.panel:
        return []
    parser = PARSERS.get(field.name)
    plain = [one for one in (int, float) if hint in (one, one | None) and not parser]
    kind: Any = plain[0] if plain else str
    if shown.words:
        kind = Literal[shown.words]
    elif isinstance(field.default, bool):
        kind = bool
    flags = FLAGS.get(field.name, (f"--{field.name.replace('_', '-')}",))
    option = typer.Option(
        *flags,
        help=shown.help + ADDED.get(field.name, ""),
        metavar=shown.metavar or None,
        parser=parser,
        rich_help_panel=shown.panel,
    )
    if field.default is None:
        kind = Optional[kind]  # noqa: UP045 (a Literal made at run time has no |)
    parameter = inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=field.default,
        annotation=Annotated[kind, option],
    )
    return [parameter]


def parse_rank(text: str | float, flag: str = "--rank") -> int | float:
    """Reads '320' as an int, '0.9' as a share of energy; an error names the flag."""
    if not isinstance(text, str):  # a default
        return text
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{flag} takes an integer or a share like 0.9, not {text!r}") from None


def parse_number_or_word(text: str | float) -> int | float | str:
    """Reads '16' as an int, '0.95' as a float; 'exact' and '50%' stay text."""
    try:
        return parse_rank(text)
    except ValueError:
        return text


def parse_strengths(text: str | None) -> tuple[float, ...] | None:
    """Reads '1,0.6' as two numbers."""
    if not isinstance(text, str):  # a default
        return text
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise ValueError(f"--strengths takes numbers like 1,0.6, not {text!r}") from None


PARSERS: dict[str, Callable[[Any], Any]] = {
    "rank": parse_rank,
    "out_rank": parse_number_or_word,
    "look": parse_number_or_word,
    "strengths": parse_strengths,
    "resume": parse_path,
    "cache": parse_path,
}
"""How the command line reads those options that are no words, switches or plain numbers."""

ADDED = {"cache": " none keeps nothing; default: PROLORA_CACHE, or the user's cache folder."}
"""What the command line says of an option, too."""

NO_CACHE = Path("none")
"""The word for no folder."""


def take_bases(words: list[Any], source: Any, target: Any) -> tuple[list[Any], tuple[Any, Any]]:
    """Takes both bases as options or, without these, from the end of the arguments.

    Raises:
        InvalidOption: one is missing.
    """
    if not source and not target and len(words) > 2:
        return words[:-2], (spell_path(words[-2]), spell_path(words[-1]))
    for name, given in (("source", source), ("target", target)):
        if not given:
            raise InvalidOption(
                f"Missing option '--{name}': bases are given as --source BASE and --target BASE, "
                "or after the LoRAs"
            )
    return words, (source, target)


@dataclass
class ExpertBases:
    """The two base models, perhaps with two experts each."""

    source: Annotated[
        list[str],
        base_option(
            "Base model the LoRA was trained on: file, folder or hub id (org/name). For Wan "
            "2.2 give the pipeline folder, or repeat --source for both expert files."
        ),
    ] = dataclasses.field(default_factory=list)
    target: Annotated[list[str], base_option("Base model to move to, in any of these forms.")] = (
        dataclasses.field(default_factory=list)
    )

    def open(self, loras: list[Path]) -> tuple[list[Path], Experts, Experts]:
        """Opens both and returns (LoRAs, source, target), each a base or two experts."""
        loras, (source, target) = take_bases(loras, self.source, self.target)
        return loras, open_experts(source), open_experts(target)


@dataclass
class OutputFlags:
    """Options of what is written and shown."""

    panel: ClassVar[str] = "Output"
    output: Annotated[
        Path | None,
        path_option("Output file (.safetensors), or a folder.", "--output", "-o", metavar="PATH"),
    ] = None
    report: Annotated[
        Path | None,
        path_option(
            "Also write the whole report: a page for people if the name ends in .html, "
            "otherwise JSON; - prints the JSON."
        ),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done; write nothing.")
    ] = False
    card: Annotated[
        bool,
        typer.Option(
            "--card",
            help="Also write a model card for the Hugging Face Hub: README.md beside the output, "
            "or in the folder of several.",
        ),
    ] = False
    as_json: JsonOption = False

    @property
    def show_tables(self) -> bool:
        """Whether people read along."""
        return not (self.as_json or self.report == Path("-"))


def find_cache(options: Any, takes_default: bool = True) -> Any:
    """Returns options with the cache asked for, or the default if it can be made."""
    folder = options.cache
    if folder == NO_CACHE:
        folder = None
    elif folder is None and takes_default:
        folder = default_folder()
        try:
            BasisCache(folder)
        except OutputError as error:
            log.warning("nothing is kept for the next LoRA: %s", error)
            folder = None
    return dataclasses.replace(options, cache=folder)


_HELP_ALL = "prolora.help_all"


def show_all_help(context: typer.Context, asked: bool) -> None:
    """Prints the help with every option and ends the command."""
    if asked and not context.resilient_parsing:
        context.meta[_HELP_ALL] = True
        print(context.get_help(), end="")
        raise typer.Exit


HelpAllOption = Annotated[
    bool,
    typer.Option(
        "--help-all", is_eager=True, callback=show_all_help, help="Show all options and exit."
    ),
]


class BriefCommand(TyperCommand):
    """A command whose help shows what most people need; `--help-all` shows the rest."""

    first: ClassVar[str] = ""  # what most people need, as words

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the help; the short one has few options, in a sentence each."""
        options: list[Any] = [p for p in self.params if isinstance(p, TyperOption)]
        before = [(option, option.hidden, option.help) for option in options]
        basic = self.first.split()
        if not ctx.meta.get(_HELP_ALL):
            for option in options:
                option.hidden = option.name not in basic
                option.help = (option.help or "").split(". ")[0].rstrip(".") + "."
        try:
            super().format_help(ctx, formatter)
        finally:
            for option, hidden, text in before:
                option.hidden, option.help = hidden, text


def expand_options(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds a parameter to a command for each field of the dataclasses it takes.

    typer makes an option of each parameter. A dataclass's `panel` heads its options in the help;
    `without` are fields that keep their defaults.
    """

    def expand(command: Callable[..., None]) -> Callable[..., None]:
        # Python 3.10's `get_type_hints` hides an `Annotated` with the default None in an Optional.
        signature = inspect.signature(command, eval_str=True)
        groups = {
            name: (kind, [p for p in _list_parameters(kind) if p.name not in without])
            for name, kind in ((x.name, x.annotation) for x in signature.parameters.values())
            if dataclasses.is_dataclass(kind)
        }
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            if parameter.name in groups:
                parameters += groups[parameter.name][1]
            else:
                parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY))

        @functools.wraps(command)
        def run(**values: Any) -> None:
            for name, (kind, taken) in groups.items():
                given: Any = kind
                values[name] = given(**{one.name: values.pop(one.name) for one in taken})
            command(**values)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return expand


def _list_parameters(kind: Any) -> list[inspect.Parameter]:
    """Lists the fields of a dataclass as keyword parameters; its own come before shared ones."""
    hints = typing.get_type_hints(kind, include_extras=True)
    by_name = {field.name: field for field in dataclasses.fields(kind)}
    names = [name for base in kind.__mro__ for name in inspect.get_annotations(base)]
    parameters = []
    for field in (by_name[name] for name in dict.fromkeys(names) if name in by_name):
        if "shown" in field.metadata:
            parameters += _derive_parameter(field, hints[field.name])
            continue
        default: Any = inspect.Parameter.empty
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        hint, option = typing.get_args(hints[field.name])
        option = copy.copy(option)  # other groups may have it too
        option.rich_help_panel = getattr(kind, "panel", None)
        annotation: Any = Annotated[hint, option]
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters.append(
            inspect.Parameter(field.name, keyword, default=default, annotation=annotation)
        )
    return parameters
