"""Conversion of text to typed values, the same for the command line and for YAML files."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

# As written by YAML 1.2 and Python; int() alone also accepts "1_000" and digits of other scripts.
_INT = re.compile(r"[-+]?[0-9]{1,19}")
_FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


class WrongType(ValueError):
    """A value of the wrong type for its option."""


def converted(kind: Any, value: Any) -> Any:
    """Convert a value to a type.

    Args:
        kind: type of the option: text, number, choice, list, tuple, mapping; each may allow null.
        value: text, or a list or mapping of such values.

    Raises:
        WrongType: the value does not fit the type.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if isinstance(value, str) and value in ("null", "~", ""):
            return None
        return converted(next(own for own in inner if own is not type(None)), value)
    if origin in (list, tuple):
        return origin(_items(origin, inner, value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise WrongType
        return {name: converted(inner[1], own) for name, own in value.items()}
    if not isinstance(value, str):
        raise WrongType
    if origin is Literal:
        if value not in inner:
            raise WrongType
        return value
    return _SCALARS[kind](value)


def _items(origin: type, inner: tuple[Any, ...], value: Any) -> list[Any]:
    if not isinstance(value, list) or (origin is tuple and len(value) != len(inner)):
        raise WrongType
    kinds = inner if origin is tuple else inner * len(value)
    return [converted(kind, own) for kind, own in zip(kinds, value, strict=True)]


def _number(pattern: re.Pattern[str], kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if not pattern.fullmatch(text):
            raise WrongType
        return kind(text)

    return read


def _bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise WrongType
    return text.lower() == "true"


_SCALARS: dict[type, Callable[[str], Any]] = {
    str: str,
    bool: _bool,
    int: _number(_INT, int),
    float: _number(_FLOAT, float),
}
