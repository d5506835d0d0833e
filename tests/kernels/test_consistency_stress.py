"""The same bits in a thousand runs: a missing fence or wait shows only in some."""

from __future__ import annotations

import pytest
import torch

from mics_kernels import multimodal_consistency_loss
from tests.kernels.implementations import GPU

RUNS = 1000
DIM, QUEUE = 256, 16384


@pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("has_ids", [False, True], ids=["plain", "ids"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("batch", [256, 1024])
def test_a_thousand_runs_give_the_same_bits(batch: int, dtype: torch.dtype, has_ids: bool) -> None:
    """Tiles of these sizes copy keys asynchronously while tensor cores read those before."""
    generator = torch.Generator("cuda").manual_seed(0)

    def unit(rows: int) -> torch.Tensor:
        numbers = torch.randn(rows, DIM, device="cuda", generator=generator)
        return torch.nn.functional.normalize(numbers, dim=1).to(dtype)

    features = [unit(batch).requires_grad_() for _ in range(2)]
    teachers, queues = [unit(batch) for _ in range(2)], [unit(QUEUE) for _ in range(2)]
    ids = {}
    if has_ids:
        ids = {
            "key_ids": torch.arange(batch, device="cuda") // 2,
            "queue_ids": [torch.arange(QUEUE, device="cuda") // 2 for _ in range(2)],
        }
    first: list[torch.Tensor] = []
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(RUNS):
        loss = multimodal_consistency_loss(
            features, teachers, queues, temperature=0.07, alpha=0.4, backend="triton", **ids
        )
        results = [loss.detach(), *torch.autograd.grad(loss, features)]
        first = first or [result.clone() for result in results]
        for one, other in zip(results, first, strict=True):
            wrong += (one != other).any()  # NaN differs from itself, and so counts
    assert wrong.item() == 0
