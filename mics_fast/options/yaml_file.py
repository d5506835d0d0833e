"""YAML restricted to text, lists and mappings: no tags, aliases, duplicates or guessed types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mics_fast.common.errors import InputError, in_a_line
from mics_fast.common.files import read_small

LARGEST, DEEPEST = 256 * 1024, 16  # bytes; levels of nesting


class _Loader(yaml.BaseLoader):
    """Composes nodes whose scalars are all text, and refuses aliases."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise InputError(f"an alias, *{self.peek_event().anchor}, wanted the value itself")
        self._depth += 1
        if self._depth > DEEPEST:
            raise InputError(f"more than {DEEPEST} levels, wanted options")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def read_yaml(file: Path) -> Any:
    """Read text, lists and mappings from a YAML file; {} for an empty one.

    Raises:
        InputError: the file is too large, or not plain YAML.
    """
    text = read_small(file, LARGEST)
    try:
        content = parse_yaml(text)
    except InputError as error:
        raise InputError(in_a_line(f"configuration {file}: {error}")) from None
    return {} if content == "" else content


def parse_yaml(text: str) -> Any:
    """Parse a text as ``read_yaml`` does a file.

    Raises:
        InputError: the text is not plain YAML.
    """
    loader = None
    try:
        loader = _Loader(text)  # checks for invalid characters
        node = loader.get_single_node()
        return "" if node is None else _plain(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", "")
        raise InputError(f"{where}{problem or 'not YAML'}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _plain(node: yaml.Node) -> Any:
    line = f"line {node.start_mark.line + 1}: "
    kind = node.id if isinstance(node, yaml.ScalarNode) else {"sequence": "seq"}.get(node.id, "map")
    expected = {"scalar": "str"}.get(kind, kind)
    if node.tag != f"tag:yaml.org,2002:{expected}":
        raise InputError(f"{line}a tag, {node.tag}, wanted a plain value")
    if isinstance(node, yaml.ScalarNode):
        return str(node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(own) for own in node.value]
    content: dict[str, Any] = {}
    for key, own in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise InputError(f"{line}a name that is a {key.id}, wanted text")
        if key.value in content:
            raise InputError(f"line {key.start_mark.line + 1}: {key.value} is there twice")
        content[key.value] = _plain(own)
    return content
