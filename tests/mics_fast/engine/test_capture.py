"""A recorded step equals the original one, whatever changes between steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from mics_fast.engine.capture import WARM_UP, CapturedUpdate
from mics_fast.engine.plan import Losses
from mics_fast.engine.update import Update, computed
from mics_kernels import checks
from tests.mics_fast.engine.steps import (
    ACCEPT_ALL,
    batches_of,
    finetuning,
    overflowing,
    plan_of,
    pretraining,
)
from tests.mics_fast.engine.tape import record_tape

GPU = torch.cuda.is_available()
STEPS = WARM_UP + 6
CASES = {
    "paper": (pretraining, {}, {}),
    "turbo": (pretraining, {"preset": "turbo"}, {}),
    "alternating": (pretraining, {"adversarial": "alternating"}, {}),
    "in parts": (pretraining, {}, {"accumulate": 2}),
    "float16": (pretraining, {}, {"scaled": True}),
    "diagonal": (finetuning, {**ACCEPT_ALL, "kl_anneal": 0.08}, {}),
    "low-rank": (finetuning, {**ACCEPT_ALL, "shift": "low-rank", "shift_rank": 4}, {}),
    "closed-form": (finetuning, {**ACCEPT_ALL, "shift": "closed-form"}, {}),
    "fine-tuning in parts": (finetuning, ACCEPT_ALL, {"accumulate": 2}),
}


def on_device(batch, device):
    """A batch's parts on another device."""

    def moved(value):
        if isinstance(value, dict):
            return {name: moved(own) for name, own in value.items()}
        return value if value is None else value.to(device)

    return tuple(replace(p, **{n: moved(v) for n, v in vars(p).items()}) for p in batch)


def history(case, size, batches, wrap, device="cpu"):
    """Run some steps; return their log and the state after them."""
    make, options, plan = CASES[case]
    scaler = torch.amp.GradScaler(device) if plan.get("scaled") else None
    stage, optimisers = make(size, torch.float16 if scaler else None, **options)
    stage.to(device)
    if scaler:
        overflowing(stage, factor=5.0)
    plan = plan_of(
        optimisers, steps=STEPS, warmup=2, final_lr={"model": 0.1}, scaler=scaler,
        accumulate=plan.get("accumulate", 1),
    )  # fmt: skip
    update = Update(stage, plan)
    train_on, logged = wrap(update), []
    for step, batch in zip(range(STEPS), batches(make), strict=False):
        values = train_on(on_device(batch, device), step)
        logged.append({name: float(own) for name, own in computed(values).items()})
    left = {
        "stage": stage.state_dict(),
        "optimisers": [own.state_dict() for own in optimisers.values()],
        "scaler": scaler.state_dict() if scaler else None,
        "skipped": update.skipped,
        "first broken": update.guard.first_steps(),
    }
    return logged, left


def assert_equal(ours, theirs):
    """Logs and final states agree bit for bit."""
    for step, (got, wanted) in enumerate(zip(ours[0], theirs[0], strict=True)):
        assert got == pytest.approx(wanted, rel=0, abs=0, nan_ok=True), step
    (got, names), (wanted, same_names) = (tree_flatten(own[1]) for own in (ours, theirs))
    assert names == same_names and sum(isinstance(value, torch.Tensor) for value in got) > 100
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture
def taped(monkeypatch):
    """Wraps an update so that operators read no values and a tape can record them."""
    monkeypatch.setenv("MICS_KERNELS_BACKEND", "reference")
    monkeypatch.setattr(checks, "looks_at_values", lambda value: False)
    return lambda update: CapturedUpdate(update, record_tape)


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_step_is_the_step(case, make_batch, tiny, taped):
    def batches(make):
        return batches_of(make, make_batch)(0)

    eager = history(case, tiny, batches, lambda update: update)
    assert len(eager[0]) == STEPS
    assert_equal(history(case, tiny, batches, taped), eager)


@pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("case", CASES)
def test_a_cuda_graph_is_the_step(case, make_batch, tiny):
    def batches(make):
        return batches_of(make, make_batch)(0)

    eager, _ = history(case, tiny, batches, lambda update: update, "cuda")
    captured, _ = history(case, tiny, batches, CapturedUpdate, "cuda")
    # Not bit for bit: gradients that a GPU adds up in any order. A number that was frozen by the
    # recording, as a learning rate, is off by far more.
    for got, wanted in zip(captured, eager, strict=True):
        assert got == pytest.approx(wanted, rel=1e-3, abs=1e-5, nan_ok=True)


def test_a_batch_of_another_shape_is_stepped_on_as_it_is(make_batch, tiny, taped):
    """A batch of another shape occurs if an image cannot be read."""

    def batches(make):
        for step in range(STEPS):
            yield (make_batch(7 if step in (WARM_UP + 1, WARM_UP + 3) else 8, seed=step),)

    eager = history("paper", tiny, batches, lambda update: update)
    assert_equal(history("paper", tiny, batches, taped), eager)


@pytest.mark.parametrize("odd", [0, 2, WARM_UP])
def test_what_is_recorded_is_the_shape_that_comes_again(make_batch, tiny, monkeypatch, taped, odd):
    """A compiled block would be compiled for a new shape in the middle of a recording."""
    recorded = []

    def record(function):
        recorded.append(step)
        return record_tape(function)

    stage, optimisers = pretraining(tiny)
    train_on = CapturedUpdate(Update(stage, plan_of(optimisers)), record)
    for step in range(2 * WARM_UP + 2):
        train_on((make_batch(7 if step == odd else 8, seed=step),), step)
    assert recorded == [odd + 1 + WARM_UP]


class Toy(nn.Module):
    """A stage with one weight, and a factor of its loss."""

    def __init__(self, factor):
        super().__init__()
        self.model = nn.Linear(1, 1)
        self.factor, self.steps = factor, 0

    def losses(self, batch, step, share=1.0):
        self.steps += 1
        loss = self.model(batch[0].label.float().unsqueeze(1)).mean() * self.factor(self, step)
        yield Losses("model", {"toy": loss})

    def after_step(self):
        pass


@pytest.mark.parametrize(
    ("factor", "complaint"),
    [
        (lambda stage, step: float(step), "waits for the device"),
        (lambda stage, step: torch.tensor(2.0), "copies a number of the host"),
        (lambda stage, step: stage.steps, None),  # frozen: the run is another one
    ],
    ids=["read", "copied", "counted"],
)
def test_the_tape_shows_what_a_graph_cannot_do(make_batch, taped, factor, complaint):
    logged = []
    for wrap in (lambda update: update, taped):
        torch.manual_seed(0)
        stage = Toy(factor)
        optimisers = {"model": torch.optim.AdamW(stage.parameters(), lr=0.1, fused=True)}
        train_on = wrap(Update(stage, plan_of(optimisers)))
        for step in range(WARM_UP):
            train_on((make_batch(4),), step)
        if wrap is taped and complaint:
            with pytest.raises(RuntimeError, match=complaint):
                train_on((make_batch(4),), WARM_UP)
            return
        logged.append([float(train_on((make_batch(4),), step)["loss"]) for step in range(3, 6)])
    assert logged[0][0] == logged[1][0] and logged[0][1:] != logged[1][1:]


def test_a_checkpoint_says_nothing_of_the_recording(make_batch, tiny, taped):
    stage, optimisers = pretraining(tiny)
    train_on = taped(Update(stage, plan_of(optimisers)))
    for step in range(WARM_UP + 2):
        train_on((make_batch(8),), step)
    for optimiser in optimisers.values():
        assert not any(group["capturable"] for group in optimiser.state_dict()["param_groups"])
