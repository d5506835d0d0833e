"""Sharded ranks make the same run as one rank with whole networks."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
from torch import multiprocessing
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from mics_fast.engine.checkpoint import Checkpoints
from mics_fast.engine.distributed import from_first
from mics_fast.engine.log import RunLog
from mics_fast.engine.loop import Loop
from mics_fast.engine.optimiser import decay_groups
from mics_fast.engine.plan import Plan
from mics_fast.engine.sharding import Shards, shard_mesh
from mics_fast.models.vit import checkpoint_activations
from tests.mics_fast.engine.steps import tensors

CPU = torch.device("cpu")
ACCEPT_ALL = {"max_uncertainty": 1.0, "min_probability": 0.0}
ALONE = {"consistency_weight": 0.0, "adversarial_weight": 0.0}  # rows that know of no others
CASES: dict[str, dict[str, Any]] = {
    "pretrain": {"teacher_momentum": 0.9},
    "pretrain: alternating": {"adversarial": "alternating"},
    "pretrain: compiled": {"preset": "turbo"},
    "pretrain: consistency alone": {"adversarial_weight": 0.0, "reconstruction_weight": 0.0},
    "pretrain: in parts": ALONE,
    "finetune": {**ACCEPT_ALL, "ema_momentum": 0.9},
    "finetune: in parts": {**ACCEPT_ALL, "modality_dropout": 0.0},
}
STEPS = 4
RESUMED = ("pretrain", "finetune")


def make_plan(case, stage, steps):
    """SGD, which does not amplify rounding; its momentum is a state to keep."""
    trained = [(n, p) for n, p in stage.model.named_parameters() if p.requires_grad]
    groups = decay_groups(trained, lr=0.05, weight_decay=0.01)
    optimisers = {"model": torch.optim.SGD(groups, momentum=0.9, fused=True)}
    if case.startswith("pretrain"):
        judge = stage.discriminator.parameters()
        optimisers["discriminator"] = torch.optim.SGD(judge, lr=0.05, fused=True)
    return Plan(
        name="stage", steps=steps, steps_per_epoch=2, optimisers=optimisers, warmup=1,
        final_lr={"model": 0.1}, clip=0.1, log_every=1, checkpoint_every=2,
        accumulate=2 if case.endswith("in parts") else 1, choose_best=False,
    )  # fmt: skip


def run(case, stage, batches, folder, *, steps=STEPS, mesh=None):
    """Go on with the run in a folder for some steps."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)  # a checkpoint holds the generator's state
    plan = make_plan(case, stage, steps)
    if mesh is not None:
        plan = replace(plan, shards=Shards(stage, stage.networks(), plan.optimisers, CPU, mesh))
        if case.endswith("in parts"):
            checkpoint_activations(stage)
        if case.endswith("compiled"):
            stage.compile_parts("blocks")

    @torch.no_grad()
    def validate():
        images = batches[0][0].views["wli"]
        return {"score": float(stage.networks()[0](images).square().mean())}

    checkpoints = Checkpoints(folder / "checkpoints", keep=9)
    loop = Loop(stage, plan, checkpoints, {}, RunLog(folder), validate)
    if (state := from_first(lambda: checkpoints.load_latest({}))) is not None:
        loop.load(state)
    loop.run(lambda step: iter(batches[step:]))
    return loop


def saved(folder, step):
    path = folder / "checkpoints" / f"step-{step:08d}" / "state.pt"
    return torch.load(path, weights_only=True)


def go_on(case, stage, batches, folder, *, after, mesh=None):
    """Go on in the folder with another run's second checkpoint."""
    first = "checkpoints/step-00000002"
    from_first(lambda: shutil.copytree(after / first, folder / first, dirs_exist_ok=True))
    run(case, stage, batches, folder, mesh=mesh)


def elements(loop):
    """Count the elements of each network and of all momentum, on this rank and in total."""
    found = {}
    for number, network in enumerate(loop.stage.networks()):
        own = list(network.parameters())
        found[f"network {number}"] = [sum(p.to_local().numel() for p in own), numel(own)]
    trained = [p for p in loop.stage.model.parameters() if p.requires_grad]
    sharded = [p for p in trained if isinstance(p, DTensor)]
    state = loop.plan.optimisers["model"].state.values()
    moments = numel(own["momentum_buffer"] for own in state)
    found["moments"] = [moments - (numel(trained) - numel(sharded)), numel(sharded)]
    return found


def numel(values):
    return sum(value.numel() for value in values)


def train_on_a_rank(rank, ranks, sharers, stages, batches, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(minutes=5),
    )
    torch.compile = partial(torch.compile, backend="aot_eager")
    mesh = shard_mesh(CPU, sharers, minutes=5)
    for case, stage in stages.items():
        own = [tuple(part.split(ranks)[rank] for part in batch) for batch in batches[case]]
        whole = folder / case
        loop = run(case, copy.deepcopy(stage), own, whole, mesh=mesh)
        if case in RESUMED:
            torch.save(elements(loop), folder / f"{case}-{rank}")
            for name, after in (("resumed", whole), ("after alone", folder / f"{case} alone")):
                target = folder / f"{case} {name}"
                go_on(case, copy.deepcopy(stage), own, target, after=after, mesh=mesh)
    torch.distributed.destroy_process_group()
    compiled = any(case.endswith("compiled") for case in stages)
    assert bool(counters["stats"]["unique_graphs"]) == compiled and not counters["graph_break"]


@pytest.fixture
def stages(make_pretraining, make_finetuning):
    """A stage for each case, in float64."""
    return {
        case: (make_pretraining if case.startswith("pretrain") else make_finetuning)(
            **options
        ).double()
        for case, options in CASES.items()
    }


@pytest.fixture
def batches(make_batch):
    """Batches of 12 rows for each case, and a run's number of them."""

    def in_double(batch):
        def views(images):
            return {name: x.double() for name, x in images.items()} if images else None

        return replace(batch, views=views(batch.views), strong=views(batch.strong))

    def of(case, step):
        rows = (make_batch(12, seed=step, first_id=12 * step),)
        if case.startswith("finetune"):
            rows += (make_batch(12, seed=step + 9, first_id=12 * step, strong=True),)
        return tuple(map(in_double, rows))

    return {case: [of(case, step) for step in range(STEPS)] for case in CASES}


def assert_same(got, wanted, *, exact=False):
    """Two runs ended with the same checkpoint, under the same names in the same order."""
    in_parts = got.name == "pretrain: in parts"
    mine, theirs = (tensors(saved(folder, STEPS)) for folder in (got, wanted))
    assert list(mine) == list(theirs)
    for name, value in theirs.items():
        if in_parts and "/queues." in name:
            continue  # the same rows in another order
        tolerance = 0.0 if exact else 1e-9
        torch.testing.assert_close(
            mine[name],
            value,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, n=name: f"{got.name} {n}: {m}",
        )


def assert_shared(counts, sharers):
    """No rank has much more than its share: a parameter of one row is on one of the sharers."""
    for name, (_, total) in counts[0].items():
        here = [own[name][0] for own in counts]
        assert sum(here) == total * len(counts) // sharers, (name, here)
        assert max(here) < 1.15 * total / sharers, (name, here)


@pytest.mark.parametrize(("ranks", "sharers"), [(2, 2), (3, 3), (4, 2)])
def test_ranks_with_a_part_each_make_the_run_of_one(stages, batches, tmp_path, ranks, sharers):
    """Two copies of the networks, each over two ranks, make it as well as one over all."""
    stages = {case: stage for case, stage in stages.items() if sharers == ranks or case in RESUMED}
    for case, stage in stages.items():
        run(case, copy.deepcopy(stage), batches[case], tmp_path / f"{case} alone")
    own = (ranks, sharers, stages, batches, tmp_path)
    multiprocessing.spawn(train_on_a_rank, own, nprocs=ranks)
    for case in stages:
        assert_same(tmp_path / case, tmp_path / f"{case} alone")
    for case in RESUMED:
        assert_same(tmp_path / f"{case} resumed", tmp_path / case, exact=True)
        assert_same(tmp_path / f"{case} after alone", tmp_path / f"{case} alone")
        then_alone = tmp_path / f"{case} then alone"
        go_on(case, stages[case], batches[case], then_alone, after=tmp_path / case)
        assert_same(then_alone, tmp_path / f"{case} alone")
        counts = [torch.load(tmp_path / f"{case}-{rank}") for rank in range(ranks)]
        assert_shared(counts, sharers)
