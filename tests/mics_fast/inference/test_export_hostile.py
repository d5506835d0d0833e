"""An exported model from elsewhere opens no other file, ends, and has a limit of memory."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys

import pytest

import mics_fast
from mics_fast.common.errors import InputError
from tests.mics_fast.preparation.preparing import scenery

onnx = pytest.importorskip("onnx", reason="needs the [export] extra")
pytest.importorskip("onnxruntime", reason="needs the [export] extra")
from onnx import TensorProto, external_data_helper, helper  # noqa: E402


def of_another_file(folder):
    model = onnx.load(folder / "model.onnx")
    weight = max(model.graph.initializer, key=lambda own: len(own.raw_data))
    external_data_helper.set_external_data(weight, "weights.bin")
    (folder / "weights.bin").write_bytes(weight.raw_data)
    weight.ClearField("raw_data")
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def that_grows(folder):
    """A model that repeats its input two to the power of forty times."""
    model = onnx.load(folder / "model.onnx")
    names = ["wli", *(f"twice{k}" for k in range(40))]
    for own, double in itertools.pairwise(names):
        model.graph.node.append(helper.make_node("Concat", [own] * 2, [double], axis=0))
    for node in model.graph.node:
        node.output[:] = ["evidence_alone" if name == "evidence" else name for name in node.output]
        node.input[:] = ["evidence_alone" if name == "evidence" else name for name in node.input]
    model.graph.node.append(
        helper.make_node("ReduceMean", [names[-1]], ["hostile_mean"], keepdims=0)
    )
    model.graph.node.append(
        helper.make_node("Add", ["evidence_alone", "hostile_mean"], ["evidence"])
    )
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def that_never_ends(folder):
    model = onnx.load(folder / "model.onnx")
    scalar = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["still_going"])], "body",
        [scalar("round", TensorProto.INT64, []), scalar("going", TensorProto.BOOL, [])],
        [scalar("still_going", TensorProto.BOOL, [])],
    )  # fmt: skip
    model.graph.node.append(helper.make_node("Loop", ["", ""], [], body=body))
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def sparse(folder):
    os.truncate(folder / "model.onnx", 1 << 40)


def pipe(folder):
    (folder / "model.onnx").unlink()
    os.mkfifo(folder / "model.onnx")


PREDICT = """
import sys
import mics_fast
from mics_fast.common.errors import run_command
from mics_fast.inference import exported_classifier
exported_classifier.memory_limit = lambda: 1 << 28
folder, image = sys.argv[1:]
run_command(lambda: print(mics_fast.load(folder).predict([{"wli": image, "nbi": image}])))
"""


@pytest.fixture
def image(tmp_path):
    scenery(1, 40, 30).save(tmp_path / "x.png")
    return tmp_path / "x.png"


def test_an_exported_model_has_a_limit_of_memory(exported, tmp_path, image):
    """In a process of its own: the limit is the process's, and half of the machine's memory."""
    shutil.copytree(exported, tmp_path / "model")
    command = [sys.executable, "-c", PREDICT, str(tmp_path / "model"), str(image)]
    assert "probability" in subprocess.run(command, capture_output=True, text=True).stdout
    that_grows(tmp_path / "model")
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert re.search("model.onnx cannot be run: .*memory", ended.stderr.splitlines()[-1])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (of_another_file, "cannot be read"),
        (that_never_ends, "holds Loop, wanted no control flow"),
        (sparse, "has 1024 GiB, wanted at most 2"),
        (pipe, "is no regular file"),
    ],
)
def test_an_exported_model_opens_no_other_file_and_ends(
    exported, tmp_path, image, damage, sentence
):
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    damage(folder)
    with pytest.raises(InputError, match=sentence) as error:
        mics_fast.load(folder).predict([{"wli": image, "nbi": image}])
    assert "model.onnx" in str(error.value) and "\n" not in str(error.value)
