"""Activation checkpointing recomputes activations and changes nothing else."""

from __future__ import annotations

import pytest
import torch

from mics_fast.models.discriminator import L2Block
from mics_fast.models.vit import Block, checkpoint_activations


def gradients(stage, batch):
    for losses in stage.losses(batch, torch.tensor(50)):
        losses.total().backward()
    return {n: p.grad for n, p in stage.named_parameters() if p.grad is not None}


def count_forwards(stage):
    calls = {Block: 0, L2Block: 0}

    def count(block, *_):
        calls[type(block)] += torch.is_grad_enabled()

    for module in stage.modules():
        if isinstance(module, Block | L2Block):
            module.register_forward_pre_hook(count)
    return calls


@pytest.mark.parametrize("stage", ["make_pretraining", "make_finetuning"])
def test_gradients_are_the_same_bit_for_bit(stage, make_batch, request):
    make = request.getfixturevalue(stage)
    batch = (make_batch(4),)
    if stage == "make_finetuning":
        batch += (make_batch(6, strong=True),)
    plain, saving = make(), make()
    checkpoint_activations(saving)
    calls = [count_forwards(plain), count_forwards(saving)]
    wanted, given = gradients(plain, batch), gradients(saving, batch)
    assert wanted.keys() == given.keys() and len(wanted) > 20
    assert all(torch.equal(given[name], wanted[name]) for name in wanted)
    assert calls[1] == {kind: 2 * count for kind, count in calls[0].items()}
    assert plain.state_dict().keys() == saving.state_dict().keys()
