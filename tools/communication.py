"""Bytes between the ranks per pre-training step, and the weak scaling to expect from them.

``python -m tools.communication`` prints the table of docs/guide/distributed.md. Payloads are exact:
a test counts them in a run of two ranks. Times are estimates from a step, a bandwidth and a latency
that the caller states; none of the defaults is a measurement.

With N ranks, a ring sends 2 (N - 1) / N times the payload of an all-reduce, and N - 1 times a
rank's own rows in an all-gather, from each rank.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import torch
from torch import nn

from mics_fast.engine.gradients import BUCKET_BYTES
from mics_fast.models.sizes import SIZES, Size
from mics_fast.options import PretrainConfig
from mics_fast.stages.pretrain import PretrainStage

BACKWARD_SHARE = 2 / 3  # of a step's computation: two products for one of the forward pass
COUNTS = 8  # all-reduced row counts of masked means and of the gradient ratio, int64
SQUARES, ACCURACY = 2, 1  # all-reduced float32: two gradient norms, the discriminator's accuracy
ANSWERS = 3  # all-reduced int64 of ``engine.distributed.agree``: failure, stop, save
# All of these that are waited for, and the gathered ids and presence; answers travel during a step.
SMALL_MESSAGES = COUNTS + 1 + 1 + 2


@dataclass(frozen=True)
class Payload:
    """Bytes that one rank hands to collectives per step, with every term on.

    Args:
        gradients: all-reduced.
        scalars: all-reduced.
        keys: all-gathered rows: teacher features, ids, presence.
    """

    gradients: int
    scalars: int
    keys: int

    def sent(self, ranks: int) -> float:
        """Return the bytes that each rank of a ring sends."""
        reduced = 2 * (ranks - 1) / ranks * (self.gradients + self.scalars)
        return reduced + (ranks - 1) * self.keys


@dataclass(frozen=True)
class Machine:
    """Assumptions about a cluster.

    Args:
        step: seconds of computation per step on one rank.
        bandwidth: bytes per second that a rank sends.
        latency: seconds per message and doubling of the ranks.
    """

    step: float
    bandwidth: float
    latency: float


def payload(
    size: Size, *, modalities: int, projection: int, rows: int, message_bytes: int = 4
) -> Payload:
    """Count the bytes of a pre-training step.

    Args:
        size: of the networks.
        modalities: number M.
        projection: width P of the contrastive features.
        rows: per rank.
        message_bytes: per gradient: 4, or 2 with ``--communication bf16``.
    """
    names = [f"m{number}" for number in range(modalities)]
    with torch.device("meta"):
        stage = PretrainStage(
            PretrainConfig(adversarial_weight=1.0), size, names, pool="mean",
            projection=projection, queue_size=1, steps_per_epoch=1, seed=0,
        )  # fmt: skip
    trained = sum(count_trained(network) for network in (stage.model, stage.discriminator))
    return Payload(
        gradients=message_bytes * trained,
        scalars=8 * COUNTS + 4 * (SQUARES + ACCURACY) + 8 * ANSWERS,
        keys=rows * (4 * modalities * projection + 8 + modalities),
    )


def count_trained(network: nn.Module) -> int:
    """Count the numbers that a network learns."""
    return sum(own.numel() for own in network.parameters() if own.requires_grad)


def efficiency(own: Payload, machine: Machine, ranks: int) -> float:
    """Estimate the share of a step that is computation, in weak scaling.

    Gradients travel during the backward pass, all but the last bucket; keys and small messages are
    waited for.
    """
    reduced = 2 * (ranks - 1) / ranks / machine.bandwidth
    hops = math.log2(ranks) * machine.latency
    last = min(own.gradients, BUCKET_BYTES)
    late = max(0.0, (own.gradients - last) * reduced - BACKWARD_SHARE * machine.step)
    keys = (ranks - 1) * own.keys / machine.bandwidth
    waited = late + last * reduced + keys + (SMALL_MESSAGES + 2) * hops  # a last bucket, features
    return machine.step / (machine.step + waited)


def table(own: Payload, machine: Machine, rows: int) -> str:
    """Format payload and efficiency for 8, 64 and 512 ranks as Markdown."""
    lines = ["| ranks | keys | sent per rank and step | expected efficiency |", "| ---: " * 4 + "|"]
    for ranks in (8, 64, 512):
        sent, share = own.sent(ranks) / 1e6, efficiency(own, machine, ranks)
        lines.append(f"| {ranks} | {ranks * rows:,} | {sent:,.0f} MB | {share:.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), default="vit_base")
    parser.add_argument("--rows", type=int, default=64, help="per rank")
    parser.add_argument("--bf16", action="store_true", help="gradients travel in bfloat16")
    parser.add_argument("--step", type=float, default=0.5, help="seconds of computation, assumed")
    parser.add_argument("--bandwidth", type=float, default=25e9, help="bytes/s per rank, assumed")
    parser.add_argument("--latency", type=float, default=20e-6, help="seconds, assumed")
    asked = parser.parse_args()
    own = payload(
        SIZES[asked.size],
        modalities=2,
        projection=256,
        rows=asked.rows,
        message_bytes=2 if asked.bf16 else 4,
    )
    print(own)
    print(table(own, Machine(asked.step, asked.bandwidth, asked.latency), asked.rows))


if __name__ == "__main__":
    main()
