"""The bytes of a step by formula are those that two ranks hand to torch.distributed."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import multiprocessing

from mics_fast.data.batch import PairBatch
from mics_fast.engine.distributed import agree
from mics_fast.engine.plan import Plan
from mics_fast.engine.update import Update
from mics_fast.options import PretrainConfig
from mics_fast.stages.pretrain import PretrainStage
from tests.mics_fast.conftest import TINY
from tools.communication import Machine, Payload, efficiency, main, payload, table

ROWS = 4


def batch_of_pairs() -> PairBatch:
    torch.manual_seed(0)
    rows = torch.arange(ROWS)
    return PairBatch(
        views={name: torch.randn(ROWS, 3, TINY.image, TINY.image) for name in ("wli", "nbi")},
        strong=None,
        present=torch.ones(ROWS, 2, dtype=torch.bool),
        label=rows,
        labelled=rows >= 0,
        sample_id=rows,
        group_id=rows,
    )


def step_on_a_rank(rank, message, folder):
    """Make two steps; store the bytes that the second one hands to each kind of collective."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    stage = PretrainStage(
        PretrainConfig(adversarial_weight=0.1), TINY, ("wli", "nbi"), pool="mean", projection=8,
        queue_size=32, steps_per_epoch=4, seed=0,
    )  # fmt: skip
    parts = {"model": stage.model, "discriminator": stage.discriminator}
    optimisers = {
        name: torch.optim.SGD([p for p in part.parameters() if p.requires_grad], lr=0.0)
        for name, part in parts.items()
    }
    plan = Plan("stage", 9, 3, optimisers, warmup=0, clip=0.0, log_every=9, checkpoint_every=0,
                message=message)  # fmt: skip
    update, handed = Update(stage, plan), {"reduced": 0, "gathered": 0}
    reduce, gather = torch.distributed.all_reduce, torch.distributed.all_gather

    def reduced(tensor, *options, **more):
        handed["reduced"] += tensor.nbytes
        return reduce(tensor, *options, **more)

    def gathered(parts, tensor, *options, **more):
        handed["gathered"] += tensor.nbytes
        return gather(parts, tensor, *options, **more)

    batch = batch_of_pairs()
    update((batch,), 0)
    with (
        mock.patch("torch.distributed.all_reduce", reduced),
        mock.patch("torch.distributed.all_gather", gathered),
    ):
        agree(False, False)
        update((batch,), 1)
    torch.save(handed, folder / f"handed-{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("message", [None, torch.bfloat16])
def test_bytes_by_formula_are_those_of_two_ranks(tmp_path, message):
    multiprocessing.spawn(step_on_a_rank, (message, tmp_path), nprocs=2)
    width = 4 if message is None else 2
    own = payload(TINY, modalities=2, projection=8, rows=ROWS, message_bytes=width)
    for rank in range(2):
        handed = torch.load(tmp_path / f"handed-{rank}", weights_only=True)
        assert handed == {"reduced": own.gradients + own.scalars, "gathered": own.keys}


def test_a_ring_sends_nearly_twice_what_it_reduces_and_all_rows_it_gathers():
    assert Payload(gradients=1000, scalars=0, keys=0).sent(2) == 1000
    assert Payload(gradients=0, scalars=800, keys=0).sent(4) == 1200
    assert Payload(gradients=0, scalars=0, keys=10).sent(512) == 5110


def test_the_table_of_the_guide_is_what_the_script_prints(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["communication"])
    main()
    first, _, printed = capsys.readouterr().out.partition("\n")
    guide = Path(__file__).parents[2] / "docs" / "guide" / "distributed.md"
    shown = guide.read_text(encoding="utf-8").partition("<!-- communication -->\n")[2]
    assert shown.startswith(printed)
    assert first == "Payload(gradients=609264648, scalars=100, keys=131712)"


def test_efficiency_falls_with_the_ranks_and_rises_with_the_bandwidth():
    own = Payload(gradients=600_000_000, scalars=100, keys=130_000)
    slow, fast = (Machine(0.5, bandwidth, 20e-6) for bandwidth in (1e9, 50e9))
    for machine in (slow, fast):
        shares = [efficiency(own, machine, ranks) for ranks in (8, 64, 512)]
        assert shares == sorted(shares, reverse=True) and 0 < shares[-1] < shares[0] < 1
    assert efficiency(own, fast, 64) > efficiency(own, slow, 64)
    assert "| 512 | 32,768 |" in table(own, fast, 64)
