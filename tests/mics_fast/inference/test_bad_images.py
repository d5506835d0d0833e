"""Mutated test images through evaluate and report: figures, or one sentence that names the file.

Each test runs for ``MICS_FUZZ_SECONDS`` (default: 3).
"""

from __future__ import annotations

import csv
import json
import shutil

import pytest

from mics_fast import evaluate, report
from mics_fast.common.errors import InputError
from mics_fast.data.manifest import write_manifest
from tests.mics_fast.mutated_images import IMAGES
from tests.mics_fast.mutation import draws, mutated


@pytest.fixture(params=["error", "skip"])
def run(request, trained_run, tmp_path):
    """A run that ends at a bad file, or skips it."""
    shutil.copytree(trained_run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text()
    assert "on_bad_file: error" in text
    config.write_text(text.replace("on_bad_file: error", f"on_bad_file: {request.param}"))
    return request.param, tmp_path / "run"


@pytest.fixture
def bad_manifest(phantom_manifest, tmp_path):
    """A manifest whose first test row has the white-light image that comes with it."""
    bad, path = tmp_path / "bad.png", tmp_path / "manifest.csv"
    with open(phantom_manifest, newline="") as file:
        records = list(csv.DictReader(file))
    for record in records:
        for name in ("wli", "nbi"):
            record[name] = str(phantom_manifest.parent / record[name])
    next(record for record in records if record["split"] == "test")["wli"] = str(bad)
    write_manifest(path, records, ["wli", "nbi"])
    return path, bad


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_mutated_images_end_in_figures_or_one_sentence(run, bad_manifest, command, tmp_path):
    (policy, folder), (manifest, bad) = run, bad_manifest
    shared = [str(folder), "--manifest", str(manifest), "--resamples", "2"]
    for draw in draws():
        bad.write_bytes(mutated(draw, draw.choice(IMAGES)))
        try:
            if command == "evaluate":
                evaluate.main([*shared, "--json", str(tmp_path / "metrics.json")])
                assert json.loads((tmp_path / "metrics.json").read_text())["n"] == 12
            else:
                report.main([*shared, "--out", str(tmp_path / "report.html")])
                assert "</html>" in (tmp_path / "report.html").read_text()
        except InputError as error:
            assert policy == "error"
            assert str(bad) in str(error) and "\n" not in str(error)
