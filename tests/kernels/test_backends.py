"""The choice of an implementation, and the errors when the requested one cannot run."""

import warnings

import pytest
import torch

from mics_kernels import backends, fuse_evidence
from mics_kernels.backends import IMPLEMENTATIONS, Implementation, explain

EVIDENCE = torch.ones(1, 2, 3)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("MICS_KERNELS_BACKEND", raising=False)


@pytest.fixture
def add_backend(monkeypatch):
    """Put an implementation of "evidential" before its reference, in place of the others."""

    def add(backend, module, refuses=lambda tensor: ""):
        rows = (Implementation(backend, module, refuses), IMPLEMENTATIONS["evidential"][-1])
        monkeypatch.setitem(IMPLEMENTATIONS, "evidential", rows)
        monkeypatch.setattr(backends, "_modules", {})
        monkeypatch.setattr(backends, "_broken", {})

    return add


@pytest.mark.parametrize("op", sorted(IMPLEMENTATIONS))
def test_every_operator_has_a_reference_that_serves_everything(op):
    for dtype in (torch.float64, torch.float16):
        choice = explain(op, torch.zeros(1, dtype=dtype), "reference")
        assert choice == ("reference", "asked for by the backend argument")


def test_the_argument_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv("MICS_KERNELS_BACKEND", "nonsense")
    assert explain("evidential", EVIDENCE, "reference").backend == "reference"
    with pytest.raises(ValueError, match="MICS_KERNELS_BACKEND must be one of reference, cpu"):
        fuse_evidence(EVIDENCE)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"backend argument must be one of .*, got 'fast'"):
        fuse_evidence(EVIDENCE, backend="fast")
    with pytest.raises(ValueError, match=r"op must be one of .*, got 'sort'"):
        explain("sort", EVIDENCE)


def test_a_backend_the_operator_does_not_have_is_refused_by_name(monkeypatch):
    rows = tuple(row for row in IMPLEMENTATIONS["shift"] if row.backend == "reference")
    monkeypatch.setitem(IMPLEMENTATIONS, "shift", rows)
    with pytest.raises(ValueError, match="asks for 'cuda', but shift has only reference"):
        explain("shift", EVIDENCE, "cuda")


def test_the_first_implementation_that_serves_the_tensor_is_taken(add_backend):
    add_backend("cpu", "evidential.reference")
    assert explain("evidential", EVIDENCE) == ("cpu", "the best available")


def test_an_implementation_that_refuses_is_passed_over_with_its_reason(add_backend):
    add_backend(
        "triton", "evidential.reference", lambda tensor: f"needs a GPU, got {tensor.device}"
    )
    choice = explain("evidential", EVIDENCE)
    assert choice.backend != "triton"
    assert "not triton: needs a GPU, got cpu" in choice.reason
    with pytest.raises(RuntimeError, match="cannot use it: needs a GPU, got cpu"):
        fuse_evidence(EVIDENCE, backend="triton")


def test_a_broken_implementation_is_told_once_with_its_cause_and_passed_over(add_backend):
    add_backend("cpu", "evidential.not_there")
    with pytest.warns(
        RuntimeWarning, match=r"its import failed \(ModuleNotFoundError: .*not_there"
    ):
        assert fuse_evidence(EVIDENCE).tolist() == [[pytest.approx(7 / 3)] * 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse_evidence(EVIDENCE)


@pytest.mark.filterwarnings("ignore:mics_kernels does without")
def test_a_broken_implementation_that_was_asked_for_is_an_error(add_backend, monkeypatch):
    add_backend("cpu", "evidential.not_there")
    with pytest.raises(RuntimeError, match=r"asks for 'cpu', but .* its import failed"):
        fuse_evidence(EVIDENCE, backend="cpu")
    monkeypatch.setenv("MICS_KERNELS_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="MICS_KERNELS_BACKEND asks for 'cpu'"):
        fuse_evidence(EVIDENCE)
