r"""PEFT's rank_pattern and alpha_pattern: numbers for matching module names.

PEFT runs every key of these tables as a regular expression, and some of those never end. No foreign
expression is run here. What people write is read (words, dots, `.*`, `\d+`, `[0-9]`, `(a|b)`, `^`
and `$`) and means what it means there; it is matched a character at a time, all ways at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ...errors import UnsupportedFormat

# A character that means itself; any letter, a class, or one that is escaped; and what may repeat.
_PLAIN = r"[^\\^$*+?{}\[\]|().]"
_ATOM = re.compile(rf"(\[\^?(?:\w-\w|[\w.])+\]|\\[dw]|\\[^\w]|\.|{_PLAIN})([*+]?)")
_CHOICE = re.compile(rf"(?<!\\)\((?:\?:)?((?:{_PLAIN}|[.|]|\\[^\w])*)\)(?![*+?{{])")

# More than any model's modules, any name's characters, and anything that people write by hand.
_MOST_PATTERNS = 16_384
_LONGEST = 1_000
_MOST_WILDCARDS = 64


class PatternTable:
    """The table of one option: the first pattern that fits a name wins."""

    def __init__(self, table: Mapping[str, float], what: str) -> None:
        """Reads pattern -> number; `what` names file and option for messages.

        Raises:
            UnsupportedFormat: too many patterns, or one that is not read.
        """
        if len(table) > _MOST_PATTERNS:
            raise UnsupportedFormat(f"{what} has {len(table)} patterns, more than any real one")
        self._values = list(table.values())
        # Tail -> (place, pattern): with a pattern for every module, most end otherwise.
        self._patterns: dict[str, list[tuple[int, _NamePattern]]] = {}
        wildcards = 0
        for place, text in enumerate(table):
            try:
                patterns = [_NamePattern(variant) for variant in _list_variants(text)]
            except (ValueError, re.error) as error:
                raise UnsupportedFormat(
                    f"{what} has {text!r:.100}, and no foreign regular expression is run: words, "
                    "dots, .*, \\d, [0-9] and (a|b) are read. Name the modules instead"
                ) from error
            wildcards += sum(not pattern.is_fixed for pattern in patterns)
            if wildcards > _MOST_WILDCARDS:
                raise UnsupportedFormat(
                    f"{what} has more than {_MOST_WILDCARDS} patterns with wildcards; name the "
                    "modules instead"
                )
            for pattern in patterns:
                self._patterns.setdefault(pattern.tail, []).append((place, pattern))

    def get(self, name: str, default: float) -> float:
        """Returns the number for module `name`."""
        places = [
            next((place for place, pattern in patterns if pattern.fits(name)), len(self._values))
            for tail, patterns in self._patterns.items()
            if name.endswith(tail)
        ]
        place = min(places, default=len(self._values))
        return default if place == len(self._values) else self._values[place]

    def __iter__(self) -> Iterator[float]:
        """Yields all numbers of the table."""
        return iter(self._values)


def _list_variants(text: str) -> list[str]:
    """Returns the pattern for every choice among its `(a|b)`.

    Raises:
        ValueError: too long, or too many.
    """
    if len(text) > _LONGEST:
        raise ValueError("too long")
    variants = [""]
    for number, piece in enumerate(_CHOICE.split(text)):  # every other is what stood in brackets
        choices = piece.split("|") if number % 2 else [piece]
        variants = [variant + choice for variant in variants for choice in choices]
        if len(variants) > _MOST_WILDCARDS:
            raise ValueError("too many choices")
    return variants


class _NamePattern:
    """One pattern without choices, against dotted ends of a name.

    Where no atom repeats, the atoms are compared one by one. Otherwise bit i of a state says that
    the first i atoms fit what was read; an atom that repeats is passed without a character.
    """

    def __init__(self, text: str) -> None:
        """Parses a pattern; raises ValueError or re.error where it is not understood."""
        body = text.removeprefix("^").removesuffix("$")
        atoms = _ATOM.findall(body)
        if sum(len(atom) + len(repeat) for atom, repeat in atoms) != len(body):
            raise ValueError(f"{text!r:.100} is not understood")
        self._begins = "start" if text.startswith("^") else "dot"
        if atoms[:1] == [(".", "*")]:
            self._begins = "anywhere"
            del atoms[0]
        self._atoms: list[str] = []
        self._repeated = 0
        for atom, repeat in atoms:
            self._atoms += [atom] * (2 if repeat == "+" else 1)
            self._repeated |= bool(repeat) << len(self._atoms) - 1
        self.is_fixed = not self._repeated
        self.tail = self._find_tail()
        self._whole = re.compile("".join(self._atoms))
        self._masks: dict[str, int] = {}

    def _find_tail(self) -> str:
        """Returns the common end of all names that fit."""
        tail = ""
        for i, atom in reversed(list(enumerate(self._atoms))):
            if self._repeated >> i & 1 or not _is_letter(atom):
                break
            tail = atom[-1] + tail
        return tail

    def fits(self, name: str) -> bool:
        """Returns whether PEFT would apply this pattern to a module with its tail."""
        if self.is_fixed:
            first = len(name) - len(self._atoms)
            begins = first >= 0 and self._may_begin(name, first)
            return begins and self._whole.fullmatch(name, first) is not None
        state = 0
        for at, letter in enumerate(name):
            if self._may_begin(name, at):
                state = self._pass(state | 1)
            there = state & self._mask(letter)
            repeated = there & self._repeated
            state = self._pass((there ^ repeated) << 1 | repeated)
        if self._may_begin(name, len(name)):
            state = self._pass(state | 1)
        return bool(state >> len(self._atoms))

    def _may_begin(self, name: str, at: int) -> bool:
        if self._begins == "dot":
            return at == 0 or name[at - 1] == "."
        return at == 0 or self._begins == "anywhere"

    def _pass(self, state: int) -> int:
        """Returns the state with repeating atoms passed."""
        while (more := state | (state & self._repeated) << 1) != state:
            state = more
        return state

    def _mask(self, letter: str) -> int:
        """Returns the atoms that a character fits."""
        if letter not in self._masks:
            self._masks[letter] = sum(
                (re.fullmatch(atom, letter) is not None) << i for i, atom in enumerate(self._atoms)
            )
        return self._masks[letter]


def _is_letter(atom: str) -> bool:
    """Returns whether an atom is one character that means itself."""
    return atom != "." and (len(atom) == 1 or (atom[0] == "\\" and not atom[1].isalnum()))
