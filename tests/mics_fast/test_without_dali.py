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
    status, stderr, stdout = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(stdout):
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    found[module] = [status, stderr.getvalue(), stdout.getvalue()]
print(json.dumps(found))
"""

SMALL = [
    "--model.size", "vit_nano", "--pretrain.steps", "1", "--finetune.steps", "1",
    "--pretrain.batch_size", "8", "--finetune.labelled_batch", "4",
    "--finetune.unlabelled_batch", "4",
]  # fmt: skip


def run(commands, system="Linux"):
    arguments = [system, json.dumps([list(map(str, command)) for command in commands])]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def results(trained_run, phantom_manifest, tmp_path_factory):
    """Exit status and output of every command, given a finished run."""
    folder = tmp_path_factory.mktemp("without")
    commands = [
        ["mics_kernels"],
        ["mics_fast.prepare", "phantom", "--out", folder / "data", "--pairs", "12"],
        ["mics_fast.train", "--data.manifest", phantom_manifest, "--out", folder / "run", *SMALL],
        ["mics_fast.evaluate", trained_run, "--resamples", "2"],
        ["mics_fast.report", trained_run, "--out", folder / "report.html", "--resamples", "2"],
        ["mics_fast.export", trained_run, "--out", folder / "model", "--resamples", "2"],
        ["mics_fast.predict", trained_run, "--manifest", phantom_manifest],
    ]
    return run(commands), folder


NAMES = ["prepare", "train", "evaluate", "report", "export", "predict"]


@pytest.mark.parametrize("module", ["mics_kernels", *(f"mics_fast.{name}" for name in NAMES)])
def test_every_command_works(results, module):
    status, said, _ = results[0][module]
    assert status == 0, said


def test_training_says_that_pillow_decodes(results):
    assert "Pillow decodes the images" in results[0]["mics_fast.train"][2]
    assert (results[1] / "run").exists() and (results[1] / "report.html").exists()


@pytest.mark.parametrize(
    ("system", "wanted"),
    [("Linux", "cannot be imported, wanted: pip install 'mics-fast[dali]'"),
     ("Darwin", "exists for Linux alone, and this is Darwin")],
)  # fmt: skip
def test_dali_where_it_is_asked_for_is_missed_in_one_sentence(
    phantom_manifest, tmp_path, system, wanted
):
    out = tmp_path / "run"
    command = ["mics_fast.train", "--data.manifest", phantom_manifest, "--out", out]
    status, said, _ = run([[*command, *SMALL, "--data.decoder", "dali"]], system)["mics_fast.train"]
    assert status == 2
    assert said == f"error: NVIDIA DALI, which reads the images, {wanted}\n"
    assert not out.exists()
