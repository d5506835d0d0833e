"""A step is the same in parts, waits for nothing, and survives overflows of float16."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mics_fast.engine.checkpoint import Checkpoints
from mics_fast.engine.log import RunLog
from mics_fast.engine.loop import Loop
from mics_fast.engine.precision import pick_precision
from mics_fast.engine.update import Update
from mics_kernels import checks
from tests.mics_fast.engine.steps import (
    ACCEPT_ALL,
    batches_of,
    finetuning,
    overflowing,
    plan_of,
    pretraining,
    tensors,
)
from tests.mics_fast.engine.tape import name_of, waits_for_the_device


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gradients(stage, optimisers, batch, parts):
    """Return the model's gradients after one step, by name."""
    Update(stage, plan_of(optimisers, clip=0.0, accumulate=parts))(batch, 50)
    return {n: p.grad for n, p in stage.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", ["reconstruction", "fine-tuning"])
def test_a_batch_in_parts_gives_the_gradients_of_the_whole(
    in_float64, tiny, make_batch, name, parts
):
    """Parts of a batch add up if its rows are independent."""
    made = []
    for count in (1, parts):
        batch = (make_batch(8),)
        if name == "reconstruction":
            stage, optimisers = pretraining(tiny, consistency_weight=0.0, adversarial_weight=0.0)
        else:
            # Agreement is a mean over complete pairs, and dropout leaves a part fewer of them.
            stage, optimisers = finetuning(tiny, modality_dropout=0.0, **ACCEPT_ALL)
            batch = (make_batch(4), make_batch(8, first_id=4, strong=True))
        made.append(gradients(stage.double(), optimisers, batch, count))
    assert made[0].keys() == made[1].keys()
    for parameter, wanted in made[0].items():
        difference = (made[1][parameter] - wanted).abs().max()
        assert difference <= 1e-12 * max(1.0, wanted.abs().max()), parameter


def test_what_is_logged_of_a_batch_in_parts_is_the_mean_over_them(tiny, make_batch):
    batch, logged = (make_batch(8),), {}
    for count in (1, 4):
        stage, optimisers = pretraining(tiny, consistency_weight=0.0, adversarial_weight=0.0)
        logged[count] = Update(stage, plan_of(optimisers, accumulate=count))(batch, 0)
    torch.testing.assert_close(logged[4]["loss"], logged[1]["loss"])
    torch.testing.assert_close(logged[4]["gradient_norm"], logged[1]["gradient_norm"])


def test_the_queue_takes_the_whole_of_a_batch_in_parts(tiny, make_batch):
    stage, optimisers = pretraining(tiny)
    Update(stage, plan_of(optimisers, accumulate=4))((make_batch(8, first_id=5),), 0)
    for queue in stage.queues:
        assert queue.length == 8 and queue.ids[:8].tolist() == list(range(5, 13))


def test_the_class_statistics_take_the_whole_of_a_batch_in_parts(tiny, make_batch):
    counts = {}
    for parts in (1, 4):
        stage, optimisers = finetuning(tiny, **ACCEPT_ALL)
        batch = (make_batch(4), make_batch(8, first_id=4, strong=True))
        Update(stage, plan_of(optimisers, accumulate=parts))(batch, 50)
        counts[parts] = stage.statistics.state_dict()
    for name, wanted in counts[1].items():
        torch.testing.assert_close(counts[4][name], wanted, msg=name)


def test_optimisers_step_once_a_batch(tiny, make_batch):
    stage, optimisers = pretraining(tiny)
    stepped = Counter()
    for name, optimiser in optimisers.items():
        optimiser.register_step_post_hook(lambda *_, name=name: stepped.update([name]))
    Update(stage, plan_of(optimisers, accumulate=4))((make_batch(8),), 0)
    assert stepped == {"model": 1, "discriminator": 1}


@pytest.mark.parametrize("make", [pretraining, finetuning])
def test_a_step_in_float16_trains_as_one_in_float32(tiny, make_batch, make):
    batch = (make_batch(8),)
    if make is finetuning:
        batch = (make_batch(4), make_batch(8, first_id=4, strong=True))
    losses = {}
    for name in ("fp32", "fp16"):
        precision = pick_precision(name, torch.device("cpu"))
        stage, optimisers = make(tiny, autocast=precision.autocast)
        scaler = precision.scaler(torch.device("cpu"))
        update = Update(stage, plan_of(optimisers, scaler=scaler))
        losses[name] = [float(update(batch, step)["loss"]) for step in range(8)]
        assert name == "fp32" or float(update.skipped) < 4
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=0.05)


def test_a_step_that_overflows_under_the_scaler_is_skipped_and_counted(tiny, make_batch):
    stage, optimisers = pretraining(tiny)
    overflowing(stage)
    scaler = torch.amp.GradScaler("cpu")
    update = Update(stage, plan_of(optimisers, scaler=scaler))
    before = copy.deepcopy(stage.model.encoder.state_dict())
    values = update((make_batch(8),), 0)
    assert not values["gradient_norm"].isfinite() and values["skipped_steps"] == 1
    for name, weight in stage.model.encoder.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert scaler.get_scale() == 2**15
    assert min(first.item() for first in update.guard.first_steps().values()) > 1, "not an error"
    for step in range(1, 12):
        values = update((make_batch(8),), step)
    assert values["gradient_norm"].isfinite() and values["skipped_steps"] < 11
    assert not torch.equal(stage.model.encoder.state_dict()[name], before[name])


def test_a_gradient_that_no_scale_makes_finite_is_an_error(tiny, make_batch):
    stage, optimisers = pretraining(tiny)
    weight = stage.model.encoder.blocks[0].attn.qkv.weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    update = Update(stage, plan_of(optimisers, scaler=torch.amp.GradScaler("cpu")))
    for step in range(18):
        update((make_batch(8),), step)
    # 2**16 is halved sixteen times first.
    assert update.guard.first_steps()["gradient_norm"] == 17


def test_the_scaler_leaves_the_discriminator_alone(tiny, make_batch):
    gradients = {}
    for name, scaler in (("plain", None), ("scaled", torch.amp.GradScaler("cpu"))):
        stage, optimisers = pretraining(tiny)
        Update(stage, plan_of(optimisers, scaler=scaler))((make_batch(8),), 0)
        gradients[name] = [p.grad for p in stage.discriminator.parameters()]
    for plain, scaled in zip(gradients["plain"], gradients["scaled"], strict=True):
        assert torch.equal(plain, scaled)


@pytest.mark.parametrize("make", [pretraining, finetuning])
def test_a_stage_in_float16_and_in_parts_resumes_exactly(tiny, make_batch, make, tmp_path):
    batches, states = batches_of(make, make_batch), {}
    for name, stops in (("whole", [6]), ("resumed", [3, 6])):
        folder = tmp_path / name
        folder.mkdir()
        checkpoints = Checkpoints(folder / "checkpoints", keep=6)
        for stop in stops:
            stage, optimisers = make(tiny, autocast=torch.float16)
            overflowing(stage, factor=5.0 if make is pretraining else 500.0)
            scaler = torch.amp.GradScaler("cpu")
            plan = plan_of(optimisers, steps=stop, scaler=scaler, accumulate=2)
            loop = Loop(stage, plan, checkpoints, {}, RunLog(folder))
            if (state := checkpoints.load_latest({})) is not None:
                loop.load(state)
            loop.run(batches)
        states[name] = checkpoints.load_latest({})
    assert 0 < states["whole"]["skipped_steps"] == states["resumed"]["skipped_steps"] < 6
    assert states["whole"]["scaler"] == states["resumed"]["scaler"]
    wanted, got = tensors(states["whole"]), tensors(states["resumed"])
    assert wanted.keys() == got.keys() and len(wanted) > 100
    for name in wanted:
        assert torch.equal(wanted[name], got[name]), name


class HostReads(TorchDispatchMode):
    """Counts per step the operators for which the host would wait for a device."""

    def __init__(self):
        super().__init__()
        self.step, self.found = 0, {}

    def count(self, name):
        self.found.setdefault(self.step, []).append(name)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if waits_for_the_device(function, args):
            self.count(name_of(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def host_reads(monkeypatch):
    """The mode; what hands numbers over without an operator is counted, too."""
    reads = HostReads()
    for name in ("tolist", "cpu", "__array__"):
        plain = getattr(Tensor, name)

        def counted(self, *args, plain=plain, name=name):
            reads.count(name)
            return plain(self, *args)

        monkeypatch.setattr(Tensor, name, counted)
    # The operators as on a GPU, where they do not look at the values of their arguments; the C++
    # ones, which no GPU runs, take numbers from where they lie.
    monkeypatch.setenv("MICS_KERNELS_BACKEND", "reference")
    monkeypatch.setattr(checks, "looks_at_values", lambda value: False)
    return reads


@pytest.mark.parametrize("scaled", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("make", [pretraining, finetuning])
def test_the_host_waits_once_a_log_record(tiny, make_batch, make, scaled, host_reads, tmp_path):
    autocast = torch.float16 if scaled else None
    stage, optimisers = make(tiny, autocast=autocast)
    scaler = torch.amp.GradScaler("cpu") if scaled else None

    def batches(step):
        for number, batch in enumerate(batches_of(make, make_batch)(step), step + 1):
            host_reads.step = number
            yield batch

    plan = plan_of(optimisers, steps=13, log_every=4, scaler=scaler)
    loop = Loop(stage, plan, Checkpoints(tmp_path / "checkpoints"), {}, RunLog(tmp_path))
    with host_reads, contextlib.suppress(StopIteration):
        loop.run(batches)
    last = host_reads.found.pop(13)  # with a checkpoint, which is copied to the host
    assert last
    assert host_reads.found == {4: ["tolist"], 8: ["tolist"], 12: ["tolist"]}


def test_a_batch_that_has_no_equal_parts_is_refused(make_batch):
    with pytest.raises(ValueError, match="a batch of 8 rows has no 3 equal parts"):
        make_batch(8).split(3)
    halves = make_batch(8, strong=True).split(2)
    assert [half.sample_id.tolist() for half in halves] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert halves[1].views["wli"].shape[0] == halves[1].strong["nbi"].shape[0] == 4
