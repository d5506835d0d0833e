"""The operators work on torch's own threads, and on none besides."""

import subprocess
import sys
import textwrap

import pytest

from tests.kernels.implementations import INTERPRETED

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="C++ backend: needs a run without interpreter"),
    pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc"),
]

PROGRAM = """
    import os
    import numpy as np
    import torch
    from mics_kernels import evidential_fusion_loss

    torch.set_num_threads(3)
    # Enough work for threads of ours, too few rows for torch to start its own.
    logits = torch.from_numpy(np.ones((20_000, 2, 8), np.float32))
    target = torch.zeros(20_000, dtype=torch.int64)

    def threads():
        return len(os.listdir("/proc/self/task"))

    alone = threads()
    evidential_fusion_loss(logits, target, kl_weight=0.5, backend="cpu")
    own = threads()
    torch.ones(2_000_000).exp()
    print(own - alone, threads() - alone)
"""


def test_an_operator_and_torch_share_their_threads() -> None:
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.split() == ["2", "2"], result.stderr
