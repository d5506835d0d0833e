"""Parsing of options from a command line and YAML files.

A configuration is only data: an unknown name is refused, values stay text until the type of their
option converts them, and nothing in a file is imported, opened or executed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from mics_fast.common.errors import InputError, SentenceParser, did_you_mean, in_a_line
from mics_fast.options.fields import type_in_words, value_in_words, walk
from mics_fast.options.values import WrongType, converted
from mics_fast.options.yaml_file import parse_yaml, read_yaml


@dataclass(frozen=True)
class Setting:
    """A value given to an option by a file or a command line.

    Args:
        name: dotted.
        value: text, or a list or mapping of text.
        where: "" or the file, for messages.
    """

    name: str
    value: Any
    where: str = ""


class ConfigParser(SentenceParser):
    """A command-line parser for the fields of dataclasses.

    Args:
        parts: prefix of the option names -> dataclass, as in {"": TrainConfig}.
        settings: of ``argparse.ArgumentParser``.
    """

    def __init__(self, parts: Mapping[str, type], **settings: Any) -> None:
        super().__init__(**settings)
        self.parts = dict(parts)
        self.kinds: dict[str, Any] = {}
        self.add_argument(
            "--config", action=_Given, dest="given", default=[], metavar="FILE",
            help="YAML file with options; a later file or option overrides an earlier one",
        )  # fmt: skip
        self.add_argument("--print_config", action="store_true", help="print all options and end")
        for prefix, kind in self.parts.items():
            self._add(f"{prefix}." if prefix else "", kind())

    def _add(self, prefix: str, config: Any) -> None:
        """Add the options of a dataclass, grouped by its parts."""
        groups: dict[str, Any] = {}
        for name, kind, default, field in walk(config, prefix):
            self.kinds[name] = kind
            title = name.rpartition(".")[0]
            if title not in groups:
                groups[title] = self.add_argument_group(title or "run")
            about = field.metadata["help"].replace("%", "%%")
            shown = value_in_words(default).replace("%", "%%")
            groups[title].add_argument(
                f"--{name}", action=_Given, dest="given", default=[], metavar=_metavar(kind),
                help=f"{about} (default: {shown})",
            )  # fmt: skip

    def read(self, arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[Setting]]:
        """Return the parser's own arguments, and the settings of options in the order given.

        Raises:
            InputError: an unknown option, or a file that is not a configuration.
        """
        found = self.parse_args(arguments)
        settings = [own for given in found.given for own in self._settings(*given)]
        return found, settings

    def configs(self, settings: Sequence[Setting], base: Any = None) -> list[Any]:
        """Make the dataclasses of ``parts`` from their defaults and the settings.

        Args:
            settings: a later one overrides an earlier one.
            base: instance that replaces the defaults of the first part.

        Raises:
            InputError: a value has the wrong type.
        """
        whole = {prefix: kind() for prefix, kind in self.parts.items()}
        if base is not None:
            whole[next(iter(whole))] = base
        for setting in settings:
            prefix = setting.name.partition(".")[0]
            inside = prefix in whole
            holder = whole[prefix if inside else ""]
            *path, last = setting.name.split(".")[int(inside) :]
            for part in path:
                holder = getattr(holder, part)
            setattr(holder, last, self._value(setting))
        return list(whole.values())

    def print_config(self, configs: Sequence[Any]) -> None:
        """Print the options as a YAML file that reproduces them."""
        for prefix, config in zip(self.parts, configs, strict=True):
            print(as_yaml({prefix: asdict(config)} if prefix else asdict(config)), end="")

    def _settings(self, name: str, value: str) -> Iterator[Setting]:
        if name != "config":
            kind = self.kinds[name]
            structured = get_origin(_without_null(kind)) in (list, tuple, dict)
            try:
                yield Setting(name, parse_yaml(value) if structured else value)
            except InputError:
                yield Setting(name, value)
            return
        content = read_yaml(Path(value))
        if not isinstance(content, dict):
            raise InputError(f"configuration {value} is no mapping, wanted options and values")
        yield from self._below("", content, value)

    def _below(self, prefix: str, content: Mapping[str, Any], file: str) -> Iterator[Setting]:
        for key, value in content.items():
            name = f"{prefix}{key}"
            if name in self.kinds:
                yield Setting(name, value, f" in {file}")
                continue
            if not any(known.startswith(f"{name}.") for known in self.kinds):
                hint = did_you_mean(name, self.kinds)
                raise InputError(in_a_line(f"option {name} in {file} is unknown{hint}"))
            if isinstance(value, dict):
                yield from self._below(f"{name}.", value, file)
            elif value != "":  # a heading without options
                raise InputError(
                    in_a_line(f"option {name} in {file} is {value}, wanted the options below it")
                )

    def _value(self, setting: Setting) -> Any:
        kind = self.kinds[setting.name]
        try:
            return converted(kind, setting.value)
        except WrongType:
            given = in_a_line(f"option {setting.name}{setting.where} is {setting.value}")
            raise InputError(f"{given}, wanted {type_in_words(kind)}") from None


class _Given(argparse.Action):
    """Stores an option and its text, in the order of the command line."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        name = str(self.option_strings[0]).removeprefix("--")
        namespace.given = [*namespace.given, (name, values)]


def as_yaml(options: Mapping[str, Any]) -> str:
    """Write options as YAML for ``read_yaml``."""
    return yaml.safe_dump(_plain(options), sort_keys=False)


def _plain(value: Any) -> Any:
    """Convert nested tuples to lists."""
    if isinstance(value, Mapping):
        return {name: _plain(own) for name, own in value.items()}
    return [_plain(own) for own in value] if isinstance(value, list | tuple) else value


def _without_null(kind: Any) -> Any:
    inner = [own for own in get_args(kind) if own is not type(None)]
    return inner[0] if type(None) in get_args(kind) else kind


def _metavar(kind: Any) -> str:
    own = _without_null(kind)
    return {int: "INT", float: "X", bool: "true|false", str: "TEXT"}.get(own) or (
        "[A, B]" if get_origin(own) in (list, tuple) else
        "{...}" if get_origin(own) is dict else "|".join(map(str, get_args(own)))
    )  # fmt: skip
