"""Contrastive learning of two modalities with a momentum teacher and a queue.

It uses ``mics_kernels`` only. Both modalities are noisy, nonlinear functions of a shared hidden
vector. Two encoders learn to find the partner of each sample among all others. The loss reads the
keys of the batch and a queue of older ones without materialising their logits.

    python examples/clip_style_loss.py [--steps 600] [--device cuda]
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mics_kernels import FeatureQueue, multimodal_consistency_loss

MODALITIES, HIDDEN, WIDTH, FEATURES, BATCH, QUEUE = 2, 8, 64, 64, 128, 4096


def pairs(count: int, seed: int) -> list[Tensor]:
    """Generate pairs: one tensor (count, WIDTH) per modality, from a hidden (count, HIDDEN)."""
    fixed, drawn = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, HIDDEN, generator=drawn)
    noise = 0.1 * torch.randn(MODALITIES, count, WIDTH, generator=drawn)
    return list(torch.sin(hidden @ torch.randn(MODALITIES, HIDDEN, WIDTH, generator=fixed)) + noise)


def train(steps: int, device: torch.device) -> nn.ModuleList:
    """Train two encoders; teacher and queue advance once per step."""
    students = nn.ModuleList(
        nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, FEATURES))
        for _ in range(MODALITIES)
    ).to(device)
    teachers = copy.deepcopy(students).requires_grad_(False)
    queues = [FeatureQueue(QUEUE, FEATURES).to(device) for _ in range(MODALITIES)]
    log_temperature = nn.Parameter(torch.tensor(0.1, device=device).log())
    optimiser = torch.optim.AdamW([*students.parameters(), log_temperature], lr=2e-3)
    for step in range(steps):
        batch = [x.to(device) for x in pairs(BATCH, seed=step + 1)]
        features = [normalize(f(x), dim=1) for f, x in zip(students, batch, strict=True)]
        with torch.no_grad():
            keys = [normalize(f(x), dim=1) for f, x in zip(teachers, batch, strict=True)]
        loss = multimodal_consistency_loss(
            features,
            keys,
            [queue.features for queue in queues],
            queue_lengths=[queue.length for queue in queues],
            temperature=log_temperature.exp(),
            alpha=0.4 * min(1.0, step / 100),
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            for teacher, student in zip(teachers.parameters(), students.parameters(), strict=True):
                teacher.lerp_(student, 0.02)
            for queue, key in zip(queues, keys, strict=True):
                queue.enqueue(key)
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:4}  loss {loss.item():.3f}  T {log_temperature.exp().item():.3f}")
    return students


@torch.no_grad()
def found(students: nn.ModuleList, device: torch.device, count: int = 1000) -> float:
    """Return the share of new pairs in which the partner is the nearest of ``count``."""
    pair = [x.to(device) for x in pairs(count, seed=0)]
    first, second = (normalize(f(x), dim=1) for f, x in zip(students, pair, strict=True))
    nearest = (first @ second.T).argmax(1)
    return (nearest == torch.arange(count, device=device)).float().mean().item()


def main() -> None:
    """Train, then print the share of 1,000 new pairs that are matched."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    students = train(arguments.steps, torch.device(arguments.device))
    print(f"{found(students, torch.device(arguments.device)):.1%} of 1000 new pairs found")


if __name__ == "__main__":
    main()
