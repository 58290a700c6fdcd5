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
_TAIL = re.compile(r"(?:(?<!\\)\w)*\Z")
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
        self._numbers: list[tuple[_NamePattern, float]] = []
        for text, number in table.items():
            try:
                patterns = [_NamePattern(variant) for variant in _list_variants(text)]
            except (ValueError, re.error) as error:
                raise UnsupportedFormat(
                    f"{what} has {text!r:.100}, and no foreign regular expression is run: words, "
                    "dots, .*, \\d, [0-9] and (a|b) are read. Name the modules instead"
                ) from error
            self._numbers += [(pattern, number) for pattern in patterns]
        if sum(pattern.repeated > 0 for pattern, _ in self._numbers) > _MOST_WILDCARDS:
            raise UnsupportedFormat(
                f"{what} has more than {_MOST_WILDCARDS} patterns with wildcards; name the modules "
                "instead"
            )

    def get(self, name: str, default: float) -> float:
        """Returns the number for module `name`."""
        return next((number for pattern, number in self._numbers if pattern.fits(name)), default)

    def __iter__(self) -> Iterator[float]:
        """Yields all numbers of the table."""
        return (number for _, number in self._numbers)


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

    Bit i of a state says that the first i atoms fit what was read; an atom that repeats is passed
    without a character.
    """

    def __init__(self, text: str) -> None:
        """Parses a pattern; raises ValueError or re.error where it is not understood."""
        body = text.removeprefix("^").removesuffix("$")
        atoms = _ATOM.findall(body)
        if sum(len(atom) + len(repeat) for atom, repeat in atoms) != len(body):
            raise ValueError(f"{text!r:.100} is not understood")
        self._anchored = text.startswith("^")
        self._atoms: list[str] = []
        self.repeated = 0  # atoms that may be passed or stay, as bits
        for atom, repeat in atoms:
            self._atoms += [atom] * (2 if repeat == "+" else 1)
            self.repeated |= bool(repeat) << len(self._atoms) - 1
        self._fixed = re.compile("".join(self._atoms))
        tail = _TAIL.search(body)
        self._tail = tail[0] if tail else ""  # of all names that fit; most end otherwise
        self._masks: dict[str, int] = {}

    def fits(self, name: str) -> bool:
        """Returns whether PEFT would apply this pattern to a module."""
        if not name.endswith(self._tail):
            return False
        if not self.repeated:
            first = len(name) - len(self._atoms)
            begins = first == 0 or (first > 0 and not self._anchored and name[first - 1] == ".")
            return begins and self._fixed.fullmatch(name, first) is not None
        state = 0
        for at in range(len(name) + 1):
            if at == 0 or (not self._anchored and name[at - 1] == "."):
                state |= 1
            while (more := state | (state & self.repeated) << 1) != state:
                state = more
            if at < len(name):
                there = state & self._mask(name[at])
                state = (there & ~self.repeated) << 1 | (there & self.repeated)
        return bool(state >> len(self._atoms))

    def _mask(self, letter: str) -> int:
        """Returns the atoms that a character fits."""
        if letter not in self._masks:
            self._masks[letter] = sum(
                (re.fullmatch(atom, letter) is not None) << i for i, atom in enumerate(self._atoms)
            )
        return self._masks[letter]
