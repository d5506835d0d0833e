"""The documentation agrees with the code: paths, links, options and examples."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("kernels/**/*.md")])
TOPS = ("mics_fast/", "kernels/", "csrc/", "bench/", "tools/", "tests/", "configs/", "examples/")
PATH = re.compile(r"`([\w./*-]+)`")
LINK = re.compile(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)")
COMMAND = re.compile(r"-m mics_fast\.(\w+)((?:[^\n`]*\\\n)*[^\n`]*)")
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
TEST_NAME = re.compile(r"`(test_\w+)`")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def options_of(command: str) -> set[str]:
    """The options that a command's help lists."""
    arguments = [sys.executable, "-m", f"mics_fast.{command}", "--help"]
    run = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(re.findall(r"--[\w.-]+", run.stdout))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_path_that_is_named_exists(page: Path) -> None:
    text = page.read_text()
    named = [path for path in PATH.findall(text) if path.startswith(TOPS)]
    missing = [path for path in named if not any(ROOT.glob(path.rstrip("/")))]
    missing += [path for path in LINK.findall(text) if not (page.parent / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_option_in_a_command_is_one(page: Path) -> None:
    wrong = []
    for command, rest in COMMAND.findall(page.read_text()):
        given = set(re.findall(r"(?<=\s)--[\w.-]+", rest))
        if command == "predict":
            given -= {"--wli", "--nbi"}  # any modality
        wrong += sorted(f"{command} {option}" for option in given - options_of(command))
    assert not wrong


def test_every_test_that_the_method_names_exists() -> None:
    tests = "\n".join(file.read_text() for file in ROOT.glob("tests/**/test_*.py"))
    named = TEST_NAME.findall((ROOT / "docs" / "method.md").read_text())
    assert named
    assert not [test for test in named if f"def {test}(" not in tests]


@pytest.mark.parametrize("page", ["README.md", "docs/operators/index.md"])
def test_the_examples_of_the_operators_run(page: str) -> None:
    blocks = PYTHON.findall((ROOT / page).read_text())
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})
