"""Declaration of options with range, source and meaning beside the field; checks, descriptions."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from mics_fast.common.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """The range of a numeric option.

    Args:
        low, high: bounds; infinite if there is none.
        open_low, open_high: True if the bound itself is excluded.
    """

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """Return True for a number in the range; NaN and integers beyond 64 bits never are."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        countable = math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63
        return countable and above and below

    def __str__(self) -> str:
        if self.high == math.inf:
            if self.low == -math.inf:
                return "a finite number"
            return f"a number {'above' if self.open_low else 'of at least'} {self.low:g}"
        if self.open_low and self.open_high:
            return f"a number between {self.low:g} and {self.high:g}"
        if self.open_low:
            return f"a number above {self.low:g} and up to {self.high:g}"
        return f"a number from {self.low:g} to {self.high:g}"


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    factory: Any = dataclasses.MISSING,
    source: str = "ours",
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    rising: bool = False,
) -> Any:
    """Declare a field of an options dataclass.

    Args:
        default: value if none is given.
        help: meaning and unit.
        factory: makes a mutable default.
        source: the work that the default comes from: "paper" (arXiv 2509.17492), "code" (its
            published pre-training code), "ALBEF", "MAE", "TMC", "EDL", "ISDA", "FixMatch", "LoRA";
            "ours": a decision of this project.
        least, above: lower bound, included or excluded; for a list, of each number.
        most, below: upper bound, included or excluded.
        rising: for two numbers, the second must not be smaller than the first.
    """
    own = Range(
        low=above if above is not None else -math.inf if least is None else least,
        high=below if below is not None else math.inf if most is None else most,
        open_low=above is not None,
        open_high=below is not None,
    )
    about = {"help": help, "source": source, "range": own, "rising": rising}
    return dataclasses.field(default=default, default_factory=factory, metadata=about)


class Option(NamedTuple):
    """One option as shown in the documentation and by ``--help``.

    Args:
        name: dotted, as on the command line.
        type: in words, such as "int or null".
        default: as YAML reads it.
        range: in words; "" if every value of the type is valid.
        source: of the default.
        text: meaning.
    """

    name: str
    type: str
    default: str
    range: str
    source: str
    text: str


def describe(options: type | None = None, prefix: str = "") -> list[Option]:
    """List all options in the order of declaration.

    Args:
        options: a dataclass of options; default: those of ``train``, then those of ``experiment``.
        prefix: of every name, as in "experiment.".
    """
    if options is None:
        from mics_fast.options import ExperimentConfig, TrainConfig

        return describe(TrainConfig) + describe(ExperimentConfig, "experiment.")
    return [
        Option(
            name,
            type_in_words(kind),
            value_in_words(value),
            range_in_words(kind, field.metadata),
            field.metadata["source"],
            field.metadata["help"],
        )
        for name, kind, value, field in walk(options(), prefix)
    ]


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, dataclasses.Field]]:
    """Yield (dotted name, type, value, field) of every option in a nested options dataclass."""
    types_of = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", types_of[field.name], value, field


def check_ranges(config: Any, prefix: str = "") -> None:
    """Refuse the first value that is out of its range.

    Args:
        config: a dataclass of options.
        prefix: of every name.

    Raises:
        InputError: names the option, its value and its range.
    """
    for name, kind, value, field in walk(config, prefix):
        own = field.metadata["range"]
        if any(not own.holds(number) for number in numbers_in(value)):
            held = "holds" if isinstance(value, list) else "is"
            shown = value if held == "is" else next(x for x in value if not own.holds(x))
            raise InputError(
                f"option {name} {held} {shown}, wanted {range_in_words(kind, field.metadata)}"
            )
        if field.metadata["rising"] and value[0] > value[1]:
            raise InputError(
                f"option {name} is {value}, wanted {range_in_words(kind, field.metadata)}"
            )


def numbers_in(value: Any) -> list[float]:
    """List the numbers in a value; empty for text, choices and null."""
    if isinstance(value, bool):
        return []
    if isinstance(value, int | float):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [number for own in value for number in numbers_in(own)]


def range_in_words(kind: Any, about: Any) -> str:
    """Describe the range of an option; "" if every value of its type is valid."""
    own: Range = about["range"]
    if own == Range() and not about["rising"]:
        return ""
    if about["rising"]:
        return f"{own.low:g} < low <= high" + (f" <= {own.high:g}" if own.high < math.inf else "")
    return f"{own} or null" if type(None) in get_args(kind) else str(own)


def type_in_words(kind: Any) -> str:
    """Describe a type for users, such as "int or null"."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        names = [type_in_words(own) for own in inner if own is not type(None)]
        return " or ".join(names + ["null"] * (type(None) in inner))
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (list, tuple):
        return f"a list such as [{', '.join('abc'[: len(inner) if origin is tuple else 2])}]"
    if origin is dict:
        return f"a mapping such as {{{'name: a' if inner[1] is float else 'wli: [a, b, c]'}}}"
    return {"str": "text", "bool": "true or false"}.get(kind.__name__, kind.__name__)


def value_in_words(value: Any) -> str:
    """Write a default as YAML does."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(value_in_words, value))}]"
    return '""' if value == "" else str(value)
