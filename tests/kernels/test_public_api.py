"""The public API: its names, its report, operators that compile without graph breaks."""

import os
import subprocess
import sys

import pytest
import torch

import mics_kernels
from mics_kernels import backends
from mics_kernels.backends import IMPLEMENTATIONS


def test_the_public_names_are_these():
    assert mics_kernels.__all__ == [
        "ClassMoments",
        "ClassStatistics",
        "FeatureQueue",
        "FusionOutput",
        "Opinion",
        "class_moments",
        "conflict",
        "consistency_loss",
        "evidential_fusion_loss",
        "evidential_loss",
        "fuse_evidence",
        "merge_moments",
        "multimodal_consistency_loss",
        "opinion",
        "shift_features",
        "shifted_cross_entropy",
    ]
    assert all(hasattr(mics_kernels, name) for name in mics_kernels.__all__)


def report(**environment):
    return subprocess.run(
        [sys.executable, "-m", "mics_kernels"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_the_report_names_versions_devices_and_every_operator():
    text = report(MICS_KERNELS_BACKEND="")
    for word in (
        "python",
        torch.__version__.split("+")[0],
        "numpy",
        "native module",
        "cpu",
        *IMPLEMENTATIONS,
    ):
        assert word in text
    assert "the best available" in text


def test_the_report_says_what_the_environment_asked_for():
    text = report(MICS_KERNELS_BACKEND="reference")
    assert text.count("asked for by the MICS_KERNELS_BACKEND") >= len(IMPLEMENTATIONS)


COMPILED = {
    "fuse_evidence": lambda x: mics_kernels.fuse_evidence(x.abs().unsqueeze(1)),
    "evidential_fusion_loss": lambda x: mics_kernels.evidential_fusion_loss(
        x.unsqueeze(1), torch.arange(len(x)), kl_weight=0.1
    ),
    "consistency_loss": lambda x: mics_kernels.consistency_loss(x, x, x, x, temperature=0.1),
    "class_moments": lambda x: mics_kernels.class_moments(x, torch.arange(len(x)), len(x)),
    "shift_features": lambda x: mics_kernels.shift_features(
        x, torch.arange(len(x)), x.abs(), strength=1.0, seed=torch.tensor([0, 1])
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_operators_compile_without_a_graph_break(name, monkeypatch):
    monkeypatch.setattr(backends, "_modules", {})  # as in a fresh process: nothing imported yet
    x = torch.randn(3, 4)
    compiled = torch.compile(COMPILED[name], fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), COMPILED[name](x))
