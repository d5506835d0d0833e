"""Calls of public kernels, on stand-ins with their signatures."""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import consistency
from bench.case import close

GPU = torch.device("cuda")  # pretended: the tensors stay here


class LigerFusedLinearCrossEntropyLoss(torch.nn.Module):
    """liger_kernel 0.8.2: transformers/fused_linear_cross_entropy.py; weight before input."""

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.reduction = reduction

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        scores = _input @ lin_weight.t()  # in the dtype of the input
        return F.cross_entropy(scores.float(), target, reduction=self.reduction)


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: str = "cce",
    vocab_parallel_options: Any = None,
) -> Tensor:
    """cut_cross_entropy 25.6.4; by default probabilities below eps / 32 get no gradient."""
    scores = e @ c.T
    if impl == "cce":
        small = scores.softmax(1) < torch.finfo(torch.bfloat16).eps / 32
        scores = torch.where(small & (targets[:, None] != torch.arange(len(c))),
                             scores.detach(), scores)  # fmt: skip
    else:
        assert impl in ("cce_exact", "torch_compile")
    return F.cross_entropy(scores.float(), targets, reduction=reduction)


def cal_flash_loss(
    q: Tensor,
    k: Tensor,
    labels: Tensor | None = None,
    scale: float | None = None,
    head_dim: int = 256,
) -> Tensor:
    """inf_cl 1.2: a loss for each row, (B,)."""
    assert q.shape[1] % head_dim == 0
    labels = torch.arange(q.shape[0]) if labels is None else labels
    query = ((1.0 if scale is None else scale) * q).float()
    return F.cross_entropy(query @ k.float().T, labels, reduction="none")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All three packages."""
    for name, offered in (
        ("liger_kernel", None),
        ("liger_kernel.transformers", LigerFusedLinearCrossEntropyLoss),
        ("cut_cross_entropy", linear_cross_entropy),
        ("inf_cl", cal_flash_loss),
    ):
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        if offered is not None:
            setattr(module, offered.__name__, offered)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """Queries, keys and queue in one, targets, and the true loss and gradient."""
    (query, _), (_, keys), (_, queue) = consistency.inputs(16, torch.device("cpu"), 4096)
    pool, target = torch.cat([keys, queue]), torch.arange(16)
    loss = F.cross_entropy(query @ pool.T / consistency.TEMPERATURE, target)
    true = consistency.gradients(loss, [query])
    return query, pool, target, true


def test_kernels_of_others_compute_what_the_case_says(installed: None, problem: Any) -> None:
    query, _, _, true = problem
    found, absent = consistency.public_kernels(GPU, *problem)
    assert absent == {} and set(found) == {"Liger-Kernel", "cut-cross-entropy", "Inf-CL"}
    for call in found.values():
        close(consistency.gradients(call(query), [query]), true, 1e-5)


def test_one_that_computes_something_else_is_left_out_and_says_why(
    installed: None, problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["inf_cl"]
    monkeypatch.setattr(module, "cal_flash_loss", lambda q, k, **_: (q @ k.T).logsumexp(1))
    found, absent = consistency.public_kernels(GPU, *problem)
    assert "Inf-CL" not in found and "off by" in absent["Inf-CL"]


def test_without_a_gpu_or_a_package_they_say_so(problem: Any) -> None:
    _, absent = consistency.public_kernels(torch.device("cpu"), *problem)
    assert set(absent.values()) == {"needs a GPU"}
    _, absent = consistency.public_kernels(GPU, *problem)
    assert absent["Inf-CL"] == "inf_cl is not installed"


def test_those_that_wait_for_the_gpu_are_marked(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No CUDA graph can capture them."""
    monkeypatch.setattr(consistency, "QUEUE", 512)
    public = consistency.public_kernels
    monkeypatch.setattr(
        consistency, "public_kernels", lambda device, *problem: public(GPU, *problem)
    )
    found = consistency.hard_rivals(16, torch.device("cpu"), False).found
    assert [name for name, rival in found.items() if rival.waits] == [
        "Liger-Kernel",
        "cut-cross-entropy",
    ]
    assert "Inf-CL" in found
