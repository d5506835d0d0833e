"""Ranks exchange values, and fail and stop together: in one sentence, at one step."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor, multiprocessing, nn

from mics_fast.common.errors import InputError, RunFailed
from mics_fast.engine import distributed, gradients
from mics_fast.engine.checkpoint import Checkpoints
from mics_fast.engine.gradients import GradientAverager
from mics_fast.engine.log import RunLog
from mics_fast.engine.loop import Loop, Losses, Plan

CPU = torch.device("cpu")


def outcome_of(action):
    """Return the result of a call, or the type and message of its exception."""
    try:
        return action()
    except (InputError, RunFailed, SystemExit) as error:
        return f"{type(error).__name__}: {error}"


def share(rank, folder):
    """Outcomes of the functions that all ranks call."""

    def first_only(sentence=""):
        (folder / "taken").open("a").write(str(rank))
        if sentence:
            raise InputError(sentence)
        return {"rank": rank}

    def one_fails():
        if rank == 1:
            raise InputError("x.jpg cannot be decoded")

    failure = RunFailed("rank 1 is broken") if rank == 1 else None
    return {
        "gathered": distributed.gather_rows(torch.tensor([[rank, 1], [rank, 2]])).tolist(),
        "own first": distributed.own_first(torch.arange(4)).tolist(),
        "flags": distributed.gather_rows(torch.tensor([rank == 1])).tolist(),
        "sum": distributed.sum_over_ranks(torch.tensor([1, rank])).tolist(),
        "mean": float(distributed.mean_over_ranks({"x": torch.tensor(1.0 + rank), "y": 3.0})["x"]),
        "least": distributed.least_over_ranks(5 - rank),
        "agreed": distributed.agree(rank == 1, False, rank == 0),
        "failed": outcome_of(lambda: distributed.agree(True, failure=failure)),
        "from first": distributed.from_first(first_only),
        "first fails": outcome_of(lambda: distributed.from_first(lambda: first_only("no disk"))),
        "from each": distributed.from_each(lambda: {"rank": rank}),
        "each fails": outcome_of(lambda: distributed.from_each(one_fails)),
        "rows": [list(distributed.share_of(range(length))) for length in (0, 1, 5)],
        "alike": outcome_of(lambda: distributed.refuse_differences({"seed": 1, "out": "a"})),
        "apart": outcome_of(lambda: distributed.refuse_differences({"a": 0, "seed": 7 + rank})),
    }


def ask_ahead(rank, folder):
    """Ask on rank 0 while rank 1 has not been asked; rank 1 is only after rank 0 has gone on."""
    gone_on, end = folder / "gone on", time.monotonic() + 60
    while rank == 1 and not gone_on.exists():
        assert time.monotonic() < end, "rank 0 waits for an answer that it has not yet read"
        time.sleep(0.01)
    question = distributed.Agreement(rank == 1, False)
    gone_on.touch()
    return question.read()


def average_gradients():
    """Average gradients of two backward passes, and of a layer used only in the second."""
    torch.manual_seed(0)
    layers = [nn.Linear(2, 2, bias=False) for _ in range(3)]
    averager = GradientAverager([layer.weight for layer in layers], bucket_bytes=1)
    x = torch.ones(1, 2) * (1 + distributed.rank())
    found = []
    for used in (layers[:2], layers):
        for layer in layers:
            layer.weight.grad = None
        for last in (False, True):  # accumulated, and averaged once
            y = x
            for layer in used:
                y = layer(y)
            if last:
                with averager.averaging():
                    y.sum().backward()
            else:
                y.sum().backward()
        found.append([None if (own := layer.weight.grad) is None else own.clone()
                      for layer in layers])  # fmt: skip
    return found


def send_gradients(message):
    """Average gradients of four layers twice; return them, and the messages of the second step."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))
    averager = GradientAverager(layers.parameters(), bucket_bytes=512, message=message)
    sent = []

    def noticed(tensor, **options):
        sent.append((str(tensor.dtype), tensor.numel()))
        return torch.distributed.all_reduce(tensor, **options)

    with (
        mock.patch.object(gradients, "FIRST_BUCKET_BYTES", 256),
        mock.patch.object(gradients, "dist", SimpleNamespace(all_reduce=noticed)),
    ):
        for _ in range(2):
            sent.clear()
            layers.zero_grad(set_to_none=True)
            with averager.averaging():
                layers(torch.ones(1, 8) / (1 + distributed.rank())).square().sum().backward()
    own = [layer.weight.grad for layer in layers]
    memory = [gradient.untyped_storage().data_ptr() for gradient in own]
    return {
        "gradients": [gradient.clone() for gradient in own],
        "sent": sent,
        "side by side": [a == b for a, b in itertools.pairwise(memory)],
    }


def start_apart(rank):
    """Start with other weights on each rank, then with other shapes."""
    own = {"weight": torch.full((2, 3), float(rank)).T, "count": torch.tensor(7 + rank),
           "seen": torch.tensor([rank == 0])}  # fmt: skip
    distributed.start_alike(own)
    other = {"weight": torch.zeros(2 + rank)}
    return {
        "alike": {name: value.tolist() for name, value in own.items()},
        "other shapes": outcome_of(lambda: distributed.start_alike(other)),
        "more": outcome_of(lambda: distributed.start_alike(other if rank == 0 else {})),
    }


@dataclass
class Batch:
    label: Tensor
    sample_id: Tensor


class Stage(nn.Module):
    """Its loss is the mean of the labels times a weight that learns nothing."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.during = lambda step: None

    def losses(self, batch, step, share=1.0):
        self.during(int(step))
        yield Losses("model", {"label": (self.weight * batch[0].label).mean()})

    def after_step(self):
        pass

    def warnings(self, record):
        return []


def run_loop(rank, folder, happens, validate=None, during=None):
    """Run a loop of nine steps; return whether it finished and its last step, or its exception.

    Rank r has label r; ``happens(step)`` runs before a batch, and may return another label;
    ``during(step)`` runs in the forward pass.
    """
    folder.mkdir(exist_ok=True)
    stage = Stage()
    stage.during = during or stage.during
    plan = Plan(
        name="stage",
        steps=9,
        steps_per_epoch=3,
        optimisers={"model": torch.optim.SGD(stage.parameters(), lr=0.0)},
        warmup=0,
        final_lr={},
        clip=0.0,
        log_every=1,
        checkpoint_every=4,
    )

    def batches(step):
        while True:
            label = happens(step)
            label = float(rank) if label is None else label
            yield (Batch(torch.tensor([label]), torch.tensor([10 * step + rank])),)
            step += 1

    loop = Loop(stage, plan, Checkpoints(folder / "checkpoints"), {}, RunLog(folder), validate)
    return outcome_of(lambda: [loop.run(batches), loop.step])


def run_loops(rank, folder):
    """Run loops that end in different ways, each decided by rank 1 only."""

    def is_stopped(step):
        if rank == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def has_no_batch(step):
        if rank == 1 and step == 5:
            raise InputError("x.jpg cannot be decoded")

    def breaks(step):
        return float("nan") if rank == 1 and step == 5 else None

    validated = []

    def validate():
        validated.append(rank)
        return {"val_rows": float(sum(distributed.from_each(lambda: 1 + rank)))}

    run_loop(rank, folder / "validated", lambda step: None, validate)
    in_step = run_loop(rank, folder / "in step", lambda step: None, during=is_stopped)
    return {"validated": validated, "stopped in step": in_step} | {
        happens.__name__: run_loop(rank, folder / happens.__name__, happens)
        for happens in (is_stopped, has_no_batch, breaks)
    }


def fail_on_one(rank):
    """Let rank 1 fail with a message; return the outcome of this rank."""

    def fail():
        with distributed.joined(CPU):
            if rank == 1:
                raise RunFailed("rank 1 has no memory left")
            distributed.sum_over_ranks(torch.ones(1))  # of a rank that will not come

    return outcome_of(fail)


def wait_in_vain(rank, folder):
    """Rank 1 is busy for longer than the time limit of rank 0."""

    def wait():
        with distributed.joined(CPU, minutes=1 / 60):
            if rank == 1:
                while not (folder / "tired").exists():
                    time.sleep(0.05)
            distributed.sum_over_ranks(torch.ones(1))

    outcome = outcome_of(wait)
    (folder / "tired").touch()
    return outcome


def work(rank, folder, port):
    """As ``torchrun`` starts it on two machines: twice, with a store that outlives the starts."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GROUP_WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    with distributed.joined(CPU):
        found = share(rank, folder)
        found["ahead"] = ask_ahead(rank, folder)
        found["gradients"] = average_gradients()
        found["fp32"], found["bf16"] = map(send_gradients, (None, torch.bfloat16))
        found["start"] = start_apart(rank)
        found |= run_loops(rank, folder)
    # On the machine of rank 0 a process has failed; the other machine did not count that.
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(1 - rank)
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(folder / f"error-{rank}.json")
    found["left"] = fail_on_one(rank)
    del os.environ["TORCHELASTIC_ERROR_FILE"]
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "2"
    found["waited"] = wait_in_vain(rank, folder)
    torch.save(found, folder / f"found-{rank}")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return the results of two ranks, and their shared folder."""
    folder = tmp_path_factory.mktemp("ranks")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("failed", "0")  # which a start before these has left behind
    multiprocessing.spawn(work, (folder, store.port), nprocs=2)
    return [torch.load(folder / f"found-{rank}", weights_only=True) for rank in (0, 1)], folder


def of_both(ranks, name):
    return [found[name] for found in ranks[0]]


def test_rows_of_all_ranks_are_gathered_in_the_order_of_ranks(ranks):
    assert of_both(ranks, "gathered") == [[[0, 1], [0, 2], [1, 1], [1, 2]]] * 2
    assert of_both(ranks, "flags") == [[False, True]] * 2
    assert of_both(ranks, "own first") == [[0, 1, 2, 3], [2, 3, 0, 1]]


def test_ranks_agree_on_numbers_and_answers(ranks):
    assert of_both(ranks, "sum") == [[2, 1]] * 2
    assert of_both(ranks, "mean") == [1.5] * 2
    assert of_both(ranks, "least") == [4] * 2
    assert of_both(ranks, "agreed") == [[True, False, True]] * 2


def test_an_answer_is_waited_for_only_when_it_is_read(ranks):
    assert of_both(ranks, "ahead") == [[True, False]] * 2


def test_a_failure_on_one_rank_is_raised_on_all(ranks):
    assert of_both(ranks, "failed") == ["RunFailed: rank 1 is broken"] * 2


def test_what_the_first_rank_does_alone_is_done_once_and_known_to_all(ranks):
    assert of_both(ranks, "from first") == [{"rank": 0}] * 2
    assert of_both(ranks, "first fails") == ["InputError: no disk"] * 2
    assert (ranks[1] / "taken").read_text() == "00"


def test_what_each_rank_does_is_known_to_all(ranks):
    assert of_both(ranks, "from each") == [[{"rank": 0}, {"rank": 1}]] * 2
    assert of_both(ranks, "each fails") == ["InputError: x.jpg cannot be decoded"] * 2
    assert of_both(ranks, "rows") == [[[], [], [0, 1]], [[], [0], [2, 3, 4]]]


def test_all_ranks_validate_together(ranks):
    assert of_both(ranks, "validated") == [[0, 0, 0], [1, 1, 1]]  # at steps 4, 8 and 9
    lines = [json.loads(x) for x in (ranks[1] / "validated" / "metrics.jsonl").open()]
    assert [line["val_rows"] for line in lines if "val_rows" in line] == [3.0] * 3


def test_ranks_that_were_started_differently_are_told_apart_on_both(ranks):
    assert of_both(ranks, "alike") == [None] * 2
    told = "InputError: process 1 was started with seed 8, but process 0 with 7; "
    assert all(sentence.startswith(told) for sentence in of_both(ranks, "apart"))


def test_gradients_are_averaged_once_also_of_what_is_used_later(ranks):
    first, second = zip(*of_both(ranks, "gradients"), strict=True)
    for step in (first, second):
        for one, other in zip(*step, strict=True):
            assert (one is None and other is None) or torch.equal(one, other)
    torch.manual_seed(0)
    layers = [nn.Linear(2, 2, bias=False) for _ in range(3)]
    for used, found in ((layers[:2], first[0]), (layers, second[0])):
        y = torch.full((1, 2), 1.5)  # the mean of the ranks' inputs
        for layer in used:
            layer.weight.grad = None
            y = layer(y)
        (2 * y).sum().backward()  # two passes add up
        for layer, gradient in zip(used, found, strict=False):
            torch.testing.assert_close(gradient, layer.weight.grad)
    assert first[0][2] is None


def test_gradients_are_views_of_buckets_of_which_the_first_is_small(ranks):
    for found in of_both(ranks, "fp32"):
        # The last layer alone, then two, then what is left: in the order of the backward pass.
        assert found["sent"] == [("torch.float32", numel) for numel in (64, 128, 64)]
        assert found["side by side"] == [False, True, False]


def test_gradients_may_travel_in_half_the_bytes(ranks):
    for half, whole in zip(of_both(ranks, "bf16"), of_both(ranks, "fp32"), strict=True):
        assert half["sent"] == [("torch.bfloat16", numel) for numel in (64, 128, 64)]
        for rounded, exact in zip(half["gradients"], whole["gradients"], strict=True):
            assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
            # Each of two summands and their sum is rounded by at most 2**-9 of its size.
            torch.testing.assert_close(rounded, exact, rtol=2**-7, atol=2**-8 * exact.abs().max())
    one, other = of_both(ranks, "bf16")
    assert all(map(torch.equal, one["gradients"], other["gradients"]))


def test_all_ranks_start_with_the_weights_of_the_first(ranks):
    first = {"weight": [[0.0, 0.0]] * 3, "count": 7, "seen": [True]}
    assert [found["alike"] for found in of_both(ranks, "start")] == [first] * 2
    for found in of_both(ranks, "start"):
        told = "InputError: process 1 was started with weight '(3,) torch.float32', but process 0 "
        assert found["other shapes"].startswith(told + "with '(2,) torch.float32'")
        assert found["more"].startswith("InputError: process 1 was started with weight None")


def test_the_failure_that_came_first_is_recorded_for_the_launcher(ranks):
    assert not (ranks[1] / "error-0.json").exists()
    recorded = json.loads((ranks[1] / "error-1.json").read_text())["message"]
    assert recorded["message"] == "RunFailed: rank 1 has no memory left"
    assert 'raise RunFailed("rank 1' in recorded["extraInfo"]["py_callstack"]


def test_sigterm_during_a_step_of_one_rank_stops_all_two_steps_later(ranks):
    """The next step has been agreed on by then, and the one after it is the first to know."""
    assert of_both(ranks, "stopped in step") == [[False, 5]] * 2
    saved = (ranks[1] / "in step" / "checkpoints").glob("step-*")
    assert max(path.name for path in saved) == "step-00000005"


def test_sigterm_on_one_rank_stops_all_at_one_step_with_one_checkpoint(ranks):
    assert of_both(ranks, "is_stopped") == [[False, 3]] * 2
    saved = list((ranks[1] / "is_stopped" / "checkpoints").glob("step-*"))
    assert [path.name for path in saved] == ["step-00000003"]


def test_a_rank_without_a_batch_ends_all_with_its_sentence(ranks):
    assert of_both(ranks, "has_no_batch") == ["InputError: x.jpg cannot be decoded"] * 2
    saved = list((ranks[1] / "has_no_batch" / "checkpoints").glob("step-*"))
    assert [path.name for path in saved] == ["step-00000004"]


def test_a_loss_that_breaks_on_one_rank_names_its_own_samples(ranks):
    one, other = of_both(ranks, "breaks")
    assert one == other
    assert "stage step 6: loss_label is not finite, on the samples 51 (manifest rows)" in one
    (file,) = (ranks[1] / "breaks" / "nonfinite").iterdir()
    stored = torch.load(file, weights_only=True)
    assert stored["batch"][0]["sample_id"].tolist() == [51] and str(file) in one


def test_the_log_holds_the_mean_over_ranks(ranks):
    lines = [json.loads(x) for x in (ranks[1] / "is_stopped" / "metrics.jsonl").open()]
    assert [line["loss"] for line in lines] == [0.5] * 3
    assert all(line["gradient_norm"] == 0.5 for line in lines)


def test_the_rank_that_fails_tells_why_and_the_others_leave_in_silence(ranks):
    assert of_both(ranks, "left") == ["SystemExit: 1", "RunFailed: rank 1 has no memory left"]


def test_a_rank_that_does_not_answer_is_not_called_dead(ranks):
    told = of_both(ranks, "waited")[0]
    assert told.startswith("RunFailed: process 0 waited 0.0166667 minutes for another one"), told


def test_one_process_alone_needs_no_group():
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    with distributed.joined(CPU):
        assert distributed.agree(True, False) == [True, False]
    with pytest.raises(InputError, match="no batch"):
        distributed.agree(failure=InputError("no batch"))
