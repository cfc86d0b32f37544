"""Options of rewards against the annotations of what takes them: text from files and flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mmalign.types import InputError

_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def check_types(name: str, target: type, options: Mapping[str, Any]) -> None:
    """Check options by the annotations of a class, as far as these are plain types.

    Raises:
        InputError: naming reward, option and value, if a value is of another type.
    """
    try:
        hints = get_type_hints(target.__init__)  # type: ignore[misc]
    except NameError:  # somebody else's class, with names that only a type checker imports
        return
    for option, value in options.items():
        hint = hints.get(option, Any)
        if not _fits(value, hint):
            raise InputError(
                f"options of reward {name!r}: {option} must be {_describe(hint)}, got {value!r}"
            )


def _fits(value: object, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if origin in (Sequence, list, tuple):
        return isinstance(value, Sequence)
    if origin in (Mapping, dict):
        return isinstance(value, Mapping)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool, NoneType):
        return isinstance(value, hint)
    if getattr(hint, "_is_protocol", False):  # an object given from Python
        return not isinstance(value, str | int | float | None)
    return True


def _describe(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        parts = [part for part in get_args(hint) if part is not NoneType]
        return " or ".join(_describe(part) for part in parts)
    if origin is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if origin in (Sequence, list, tuple):
        return "a list"
    if origin in (Mapping, dict):
        return "a mapping"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))
