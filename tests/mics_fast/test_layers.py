"""Imports run one way: each package imports the ones below it, and none above or beside it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Top to bottom. Packages of one line do not import each other.
LAYERS = [
    {"commands"},
    {"reporting", "study"},
    {"inference"},
    {"training"},
    {"evaluation"},
    {"stages", "preparation"},
    {"data"},
    {"models", "engine"},
    {"options"},
    {"common"},
]
RANK = {name: height for height, names in enumerate(reversed(LAYERS)) for name in names}
COMMANDS = {"prepare", "train", "evaluate", "predict", "report", "export", "experiment"}


def files() -> list[Path]:
    return sorted((ROOT / "mics_fast").rglob("*.py"))


def imported(tree: ast.Module) -> set[str]:
    """Names of the modules that a file imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(module: str) -> str:
    """The package of a module of mics_fast; "commands" for the modules of the top level."""
    first = module.split(".")[1]
    return first if first in RANK else "commands"


def upward(file: str, source: str) -> list[str]:
    """The imports of a file that do not lead downwards."""
    own = room(file.removesuffix(".py").replace("/", "."))
    found = []
    for name in sorted(imported(ast.parse(source))):
        if not name.startswith("mics_fast."):
            continue
        other = room(name)
        if other != own and RANK[other] >= RANK[own]:
            found.append(f"{file} imports {name}")
        if own == other == "commands" and name.split(".")[1] in COMMANDS:
            found.append(f"{file} imports {name}")
    return found


def test_imports_run_downwards() -> None:
    found = [line for file in files()
             for line in upward(str(file.relative_to(ROOT)), file.read_text())]  # fmt: skip
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("mics_fast/engine/loop.py", "from mics_fast.data.manifest import Row"),
        ("mics_fast/models/vit.py", "import mics_fast.engine.loop"),
        ("mics_fast/study/cells.py", "from mics_fast.train import main"),
        ("mics_fast/report.py", "from mics_fast.evaluate import parse"),
    ],
)
def test_an_import_upwards_or_sideways_is_found(file: str, line: str) -> None:
    assert upward(file, line)


def test_every_package_has_a_layer() -> None:
    packages = {path.parent.name for path in (ROOT / "mics_fast").glob("*/__init__.py")}
    assert packages == set(RANK) - {"commands"}


def test_the_top_level_holds_the_commands_alone() -> None:
    modules = {path.stem for path in (ROOT / "mics_fast").glob("*.py")}
    assert modules == COMMANDS | {"__init__", "__main__"}


def test_the_operators_import_nothing_of_the_trainer_or_the_benchmarks() -> None:
    for file in sorted((ROOT / "kernels").rglob("*.py")):
        for name in imported(ast.parse(file.read_text())):
            assert name.split(".")[0] not in {"mics_fast", "bench", "nvidia"}, file
