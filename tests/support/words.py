"""Prints how often the docstrings and comments use words that make them hard to read.

    python tests/support/words.py [ROOT]

One row per folder of the package, and one each for csrc, tests and bench: the words of docstrings
and comments, and the uses of each expression per 1,000 of them. A capital "What" is not counted.
Nothing is limited: a text with good rates can still be a riddle.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORD = re.compile(r"\w+")
EXPRESSIONS = {
    "what": re.compile(r"\bwhat\b"),
    "where": re.compile(r"\bwhere\b"),
    "alone": re.compile(r"\balone\b"),
    "beside": re.compile(r"\bbeside\b"),
    "told": re.compile(r"\b(?:told|tells?)\b"),
    "example": re.compile(r"\b(?:[Ff]or example\b|[Ss]uch as\b|e\.g\.)"),
}
# A string, which may contain //, or a comment.
CPP_PART = re.compile(
    r'"(?:\\.|[^"\\\n])*"|' + r"'(?:\\.|[^'\\\n])'|" + r"//[^\n]*|/\*.*?\*/", re.DOTALL
)


def read_python(text: str) -> Iterator[str]:
    """Yields the docstrings and comments of a Python source, without `#`."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented):
            yield ast.get_docstring(node) or ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string.lstrip("#! ")


def read_cpp(text: str) -> Iterator[str]:
    """Yields the comments of a C++ or CUDA source, without `//`."""
    for part in CPP_PART.findall(text):
        if part.startswith("/"):
            yield re.sub(r"^\s*(?://|/\*|\*/?)|\*/$", "", part, flags=re.MULTILINE)


def count_words(texts: Iterable[str]) -> Counter[str]:
    """Counts the words, and the uses of each expression."""
    text = re.sub(r"\s+", " ", "\n".join(texts))  # "for example" may be broken across lines
    counts = Counter({name: len(found.findall(text)) for name, found in EXPRESSIONS.items()})
    counts["words"] = len(WORD.findall(text))
    return counts


def count_folder(folder: Path, pattern: str = "**/*") -> Counter[str]:
    """Counts the words of the sources in a folder."""
    texts: list[str] = []
    for file in sorted(folder.glob(pattern)):
        if file.suffix == ".py":
            texts += read_python(file.read_text("utf-8"))
        elif file.suffix in (".h", ".cpp", ".cu"):
            texts += read_cpp(file.read_text("utf-8"))
    return count_words(texts)


def list_rows(root: Path = ROOT) -> dict[str, Counter[str]]:
    """Returns folder -> its counts; "python/prolora" is the sum of the rows above it."""
    package = root / "python/prolora"
    folders = sorted(path for path in package.iterdir() if (path / "__init__.py").is_file())
    rows = {f"{folder.name}/": count_folder(folder) for folder in folders}
    rows["*.py"] = count_folder(package, "*.py")
    rows["python/prolora"] = sum(rows.values(), Counter())
    return rows | {name: count_folder(root / name) for name in ("csrc", "tests", "bench")}


def format_table(rows: dict[str, Counter[str]]) -> str:
    """Returns a table of the words, and of the uses per 1,000 words."""
    lines = [f"{'per 1,000 words':16}{'words':>8}" + "".join(f"{x:>9}" for x in EXPRESSIONS)]
    for name, counts in rows.items():
        rates = (1000 * counts[x] / max(counts["words"], 1) for x in EXPRESSIONS)
        lines.append(f"{name:16}{counts['words']:8}" + "".join(f"{x:9.2f}" for x in rates))
    return "\n".join(lines)


if __name__ == "__main__":
    print(format_table(list_rows(*map(Path, sys.argv[1:]))))
