"""Thirty steps of each stage in float64 on the CPU, against stored losses.

A change that is meant to change the losses writes them anew, and says so in its commit:

    MICS_WRITE_GOLDEN=1 python -m pytest tests/mics_fast/stages/test_golden.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

STORED = Path(__file__).with_name("golden.json")
STEPS = 30


def double(batch):
    for views in (batch.views, batch.strong or {}, batch.teacher or {}):
        views.update({name: images.double() for name, images in views.items()})
    return batch


def run(stage, batch_of):
    """Return the losses by term and step; the optimisers are those of the trainer."""
    stage.double()
    optimisers = {"model": torch.optim.AdamW(_trained(stage.model), lr=1e-3)}
    if hasattr(stage, "discriminator"):
        optimisers["discriminator"] = torch.optim.Adam(
            _trained(stage.discriminator), lr=2e-4, betas=(0.5, 0.999)
        )
    history = []
    for step in range(STEPS):
        terms = {}
        for losses in stage.losses(batch_of(step), torch.tensor(step)):
            optimisers[losses.optimiser].zero_grad()
            losses.total().backward()
            optimisers[losses.optimiser].step()
            terms |= {name: term.item() for name, term in losses.terms.items()}
        stage.after_step()
        history.append(terms)
    return history


def _trained(module):
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def check(name, history):
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    if os.environ.get("MICS_WRITE_GOLDEN"):
        STORED.write_text(json.dumps({**stored, name: history}, indent=1) + "\n")
        return
    assert len(stored[name]) == len(history) == STEPS
    for step, (ours, theirs) in enumerate(zip(history, stored[name], strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-7, abs=1e-7), f"{name} step {step}"


@pytest.mark.parametrize(
    "options",
    [
        {"adversarial_balance": "fixed"},
        {"adversarial_balance": "fixed", "preset": "turbo"},
        {"adversarial_balance": "fixed", "adversarial": "alternating"},
        {"adversarial_balance": "adaptive"},
        {"adversarial_balance": "adaptive", "preset": "turbo"},
        {"teacher_views": "independent", "adversarial_weight": 0.0},
    ],
    ids=["paper", "turbo", "alternating", "balanced", "balanced turbo", "independent"],
)
def test_pretraining_repeats_its_stored_losses(make_pretraining, make_batch, options, request):
    def batch(step):
        pairs = make_batch(4, first_id=4 * (step % 5), seed=step)
        pairs.present[step % 4, step % 2] = False
        if "teacher_views" in options:
            pairs.teacher = make_batch(4, seed=100 + step).views
        return (double(pairs),)

    name = f"pretrain {request.node.callspec.id}"
    check(name, run(make_pretraining(teacher_momentum=0.9, **options), batch))


@pytest.mark.parametrize("shift", ["diagonal", "low-rank", "closed-form"])
def test_finetuning_repeats_its_stored_losses(make_finetuning, make_batch, shift):
    def batch(step):
        unlabelled = make_batch(6, first_id=6 * (step % 4), strong=True, seed=100 + step)
        unlabelled.present[step % 6, step % 2] = False
        return double(make_batch(4, first_id=4 * (step % 3), seed=step)), double(unlabelled)

    options = {"max_uncertainty": 1.0, "min_probability": 0.0, "kl_anneal": 0.2}
    stage = make_finetuning(shift=shift, ema_momentum=0.9, **options)
    check(f"finetune {shift}", run(stage, batch))
