"""Everything that `prolora` exports has a docstring, public methods and properties included."""

import functools
import inspect

import prolora

METHODS = (staticmethod, classmethod, property, functools.cached_property)


def has_docstring(value):
    """Returns True if `value` has a docstring of its own, not the one that a dataclass generates.

    A dataclass without a docstring gets its signature, for example `Point(x: int, y: int)`.
    """
    text = value.__doc__ or ""
    is_signature = inspect.isclass(value) and text.startswith(f"{value.__name__}(")
    return bool(text.strip()) and not is_signature


def list_members(cls, package):
    """Returns name -> public functions and properties that `cls` and its bases define.

    Bases outside the package are ignored. An override needs no docstring if its base has one.
    """
    members = {}
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] == package:
            for name, value in vars(base).items():
                is_member = inspect.isfunction(value) or isinstance(value, METHODS)
                if is_member and not name.startswith("_"):
                    members.setdefault(name, []).append(value)
    return members


def check_docstrings(exported, package):
    """Returns the names that were checked, and those without a docstring."""
    checked, missing = [], []
    for name, value in exported.items():
        if not inspect.isclass(value) and not inspect.isfunction(value):
            continue  # a constant
        parts = {name: [value]}
        if inspect.isclass(value):
            members = list_members(value, package)
            parts |= {f"{name}.{member}": values for member, values in members.items()}
        checked += parts
        missing += [part for part, values in parts.items() if not any(map(has_docstring, values))]
    return checked, missing


def test_everything_exported_has_a_docstring():
    exported = {name: getattr(prolora, name) for name in prolora.__all__}
    checked, missing = check_docstrings(exported, "prolora")
    assert missing == []
    assert {"project", "LowRank", "LowRank.to", "Lora.open", "Similarity.above_left"} <= {*checked}
    assert not {"ProLoRAError.with_traceback", "METHODS", "DEFAULT_RANK"} & {*checked}


def test_missing_docstrings_are_found_in_classes_methods_and_properties():
    import dataclasses

    class Outside(Exception):
        pass

    class Base(Outside):
        """A base."""

        def documented(self):
            """Returns nothing."""

        def bare(self): ...

        @classmethod
        def make(cls): ...

        def _private(self): ...

    @dataclasses.dataclass
    class Derived(Base):
        size: int = 0

        def documented(self): ...

        @property
        def half(self): ...

        @functools.cached_property
        def twice(self):
            """(size, size), summed."""

    def function(): ...

    Outside.__module__ = "other"
    Base.__module__ = Derived.__module__ = "mine.classes"
    exported = {"Derived": Derived, "function": function, "NUMBER": 1}
    checked, missing = check_docstrings(exported, "mine")
    assert missing == ["Derived", "Derived.half", "Derived.bare", "Derived.make", "function"]
    assert {*checked} - {*missing} == {"Derived.documented", "Derived.twice"}
