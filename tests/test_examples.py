"""The examples that stand alone do what they say, in a shorter run."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def test_views_learn_to_find_each_other() -> None:
    example = load("clip_style_loss")
    torch.manual_seed(0)
    device = torch.device("cpu")
    before = example.found(example.train(1, device), device)
    after = example.found(example.train(150, device), device)
    assert before < 0.02 and after > 0.2  # of 1,000; measured 0.000 and 0.386


def test_the_notebook_runs_from_pairs_to_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = json.loads((EXAMPLES / "first_run.ipynb").read_text())
    cells = ["".join(own["source"]) for own in notebook["cells"] if own["cell_type"] == "code"]
    length = "pairs, steps = 600, 600"
    assert length in cells[0], "the cell that says how long it takes"
    (tmp_path / "configs").symlink_to(EXAMPLES.parent / "configs")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in cells:
        short = cell.replace(length, "pairs, steps = 60, 3")
        short = short.replace('"--json"', '"--resamples", "10", "--json"')
        exec(compile(short, "first_run.ipynb", "exec"), names)
    answers = [line for line in capsys.readouterr().out.splitlines() if " -> " in line]
    assert [line.split(" -> ")[0] for line in answers][-2:] == ["wli, nbi", "wli"]
    assert not any(own["outputs"] for own in notebook["cells"] if own["cell_type"] == "code")
