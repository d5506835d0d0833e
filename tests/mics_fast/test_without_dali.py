"""Without NVIDIA DALI everything imports, and commands that need it say so with status 2."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# In a process of its own, in which DALI cannot be imported, as on macOS: each command as
# ``python -m`` runs it, what it left on stderr and its exit status.
SCRIPT = """
import contextlib, io, json, platform, runpy, sys
sys.modules["nvidia.dali"] = None
import mics_fast, mics_kernels
platform.system = lambda name=sys.argv[1]: name
found = {}
for module, *arguments in json.loads(sys.argv[2]):
    sys.argv[1:] = arguments
    sys.modules.pop(module, None)  # where another command has imported it
    status, stderr = 0, io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    found[module] = [status, stderr.getvalue()]
print(json.dumps(found))
"""


def run(commands, system="Linux"):
    arguments = [system, json.dumps([list(map(str, command)) for command in commands])]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def results(trained_run, phantom_manifest, tmp_path_factory):
    """Collect the output of every command; a finished run exists already."""
    folder = tmp_path_factory.mktemp("without")
    data = ["--data.manifest", phantom_manifest]
    commands = [
        ["mics_kernels"],
        ["mics_fast.prepare", "phantom", "--out", folder / "data", "--pairs", "12"],
        ["mics_fast.train", *data, "--out", folder / "run", "--model.size", "vit_micro"],
        [
            "mics_fast.experiment",
            *data,
            "--out",
            folder / "study",
            "--experiment.label_counts",
            "[2]",
        ],
        ["mics_fast.evaluate", trained_run],
        ["mics_fast.report", trained_run, "--out", folder / "report.html"],
        ["mics_fast.export", trained_run, "--out", folder / "model"],
        ["mics_fast.predict", trained_run, "--manifest", phantom_manifest],
    ]
    return run(commands), folder


@pytest.mark.parametrize("module", ["mics_kernels", "mics_fast.prepare", "mics_fast.export"])
def test_what_reads_no_batch_works(results, module):
    assert results[0][module][0] == 0, results[0][module][1]


@pytest.mark.parametrize("name", ["train", "experiment", "evaluate", "report", "predict"])
def test_what_reads_batches_says_what_is_missing(results, name):
    status, said = results[0][f"mics_fast.{name}"]
    assert status == 2
    assert said == (
        "error: NVIDIA DALI, which reads the images, cannot be imported, wanted: "
        "pip install 'mics-fast[train]'\n"
    )


def test_nothing_is_left_of_a_training_that_could_not_begin(results):
    assert (results[1] / "data" / "manifest.csv").exists()
    assert not (results[1] / "run").exists() and not (results[1] / "report.html").exists()


def test_a_system_for_which_there_is_no_dali_is_named(phantom_manifest, tmp_path):
    command = ["mics_fast.train", "--data.manifest", phantom_manifest, "--out", tmp_path / "run"]
    status, said = run([command], system="Darwin")["mics_fast.train"]
    assert status == 2 and "exists for Linux alone, and this is Darwin" in said
    assert said.count("\n") == 1
