"""Small changes to a file's code, each of which some test should notice."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
_FUNCTIONS = {"min": "max", "max": "min", "any": "all", "all": "any"}
_DROPPED = (ast.Raise, ast.AugAssign, ast.Continue, ast.Break, ast.Delete)


@dataclass(frozen=True)
class Mutant:
    """A change of one place."""

    line: int  # where
    function: str  # the outermost function that it is in, as "name:line"; "" outside of functions
    what: str  # the change, for people
    text: str  # the whole file with it


def list_mutants(text: str) -> list[Mutant]:
    """All mutants of a file, in the order of its lines."""
    mutants = []
    for node, function in _list_nodes(ast.parse(text), ""):
        for place, other in _list_changes(node):
            changed, before = _replace(text, place, other)
            what = f"{_shorten(before)} -> {_shorten(other)}"
            mutants.append(Mutant(place.lineno, function, what, changed))
    return sorted(mutants, key=lambda mutant: mutant.line)


def _list_nodes(node: ast.AST, function: str) -> Iterator[tuple[ast.AST, str]]:
    """All nodes that run, with the function that they are in: no annotations, no texts."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        function = function or f"{node.name}:{node.lineno}"
        children: list[ast.AST] = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
        children += node.body
    elif isinstance(node, ast.AnnAssign):
        children = [node.value] if node.value else []
    elif isinstance(node, ast.JoinedStr):
        children = []  # before Python 3.12 what is in it has no place
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        children = []
    else:
        children = list(ast.iter_child_nodes(node))
    yield node, function
    for child in children:
        yield from _list_nodes(child, function)


def _list_changes(node: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """What can be changed at a node: the place, and what stands there then."""
    if isinstance(node, ast.Compare):
        for number, operator in enumerate(node.ops):
            if type(operator) in _SWAPS:
                other = deepcopy(node)
                other.ops[number] = _SWAPS[type(operator)]()  # type: ignore[call-overload]
                yield node, f"({ast.unparse(other)})"
    elif isinstance(node, ast.BoolOp | ast.BinOp) and type(node.op) in _SWAPS:
        if not _is_text(node):
            changed = deepcopy(node)
            changed.op = _SWAPS[type(node.op)]()  # type: ignore[assignment]
            yield node, f"({ast.unparse(changed)})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node, f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield node, repr(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield node, repr(node.value + 1)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id in _FUNCTIONS:
            yield node.func, _FUNCTIONS[node.func.id]
    elif isinstance(node, ast.IfExp):
        yield node.test, f"(not ({ast.unparse(node.test)}))"
    elif isinstance(node, ast.If | ast.While):
        yield node.test, f"(not ({ast.unparse(node.test)}))"
    elif isinstance(node, ast.comprehension):
        for test in node.ifs:
            yield test, "True"
    elif isinstance(node, _DROPPED) or _is_effect(node):
        yield node, "pass"  # type: ignore[misc]


def _is_text(node: ast.BoolOp | ast.BinOp) -> bool:
    """Whether it joins texts, which a message is made of."""
    return isinstance(node, ast.BinOp) and any(
        isinstance(side, ast.JoinedStr)
        or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in (node.left, node.right)
    )


def _is_effect(node: ast.AST) -> bool:
    """Whether it is a statement for what it does to something: a call, or a part that is set."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    if not isinstance(node, ast.Assign):
        return False
    return all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets)


def _replace(text: str, place: ast.expr | ast.stmt, other: str) -> tuple[str, str]:
    """The text with something else in a place, and what stood there."""
    lines = text.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    data = b"".join(lines)
    assert place.end_lineno is not None and place.end_col_offset is not None
    first = starts[place.lineno - 1] + place.col_offset
    last = starts[place.end_lineno - 1] + place.end_col_offset
    changed = data[:first] + other.encode() + data[last:]
    return changed.decode(), data[first:last].decode()


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 90 else f"{line[:60]} … {line[-27:]}"
