"""Sharding of networks over ranks (FSDP2), for encoders that do not fit on one device.

The ranks that share one copy are all of the run, or those of one machine, as a mesh of machines x
ranks: gradients are then also averaged between the machines (hybrid sharding).

A rank keeps its part, rows of the first dimension, of every parameter of a sharded network, trained
or averaged. A block is gathered only while it runs, forward or backward, and its gradients are
averaged by reduce-scatter. Optimisers get the parts as plain tensors that share the memory of
torch's DTensors: their state is equally small, and one fused step serves sharded and whole
parameters alike, with the groups and order of an unsharded checkpoint.

Everything else stays whole on every rank, under ``GradientAverager``: modules used outside a
forward pass of their own (heads, projections, temperature, the discriminator, whose power iteration
reads its weights) and buffers (queues, statistics).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from mics_fast.engine.checkpoint import CheckpointState
from mics_fast.engine.distributed import rank, sum_over_ranks, world_size
from mics_fast.engine.optimiser import parameters_of


def shard_mesh(device: torch.device, sharers: int, minutes: float) -> DeviceMesh:
    """Return the mesh of ranks for ``Shards``; a collective call.

    Args:
        device: of this rank.
        sharers: ranks that share one copy, consecutive ones: all, or a divisor of their number.
        minutes: how long one rank waits for another.

    Returns:
        A mesh of one dimension, or of two: copies x sharers.
    """
    if sharers == world_size():
        return init_device_mesh(device.type, (sharers,))
    ranks = torch.arange(world_size()).view(-1, sharers)
    # init_device_mesh would give the groups torch's own time limit.
    groups = [
        dist.new_subgroups_by_enumeration(own.tolist(), timeout=timedelta(minutes=minutes))[0]
        for own in (ranks.T, ranks)
    ]
    names = ("copies", "sharers")
    return DeviceMesh.from_group(groups, device.type, mesh=ranks, mesh_dim_names=names)


class Shards:
    """This rank's part of the sharded networks of a stage.

    Args:
        stage: on the CPU, with the same initial weights on all ranks; moved to the device.
        networks: modules of it that are used only by calling them; modules in their lists (blocks)
            are gathered one by one, the rest of each network together.
        optimisers: of the stage, before their first step; from now on they step the parts.
        device: of this rank.
        mesh: of ``shard_mesh``; the networks are sharded over its last dimension.
    """

    def __init__(
        self,
        stage: nn.Module,
        networks: Iterable[nn.Module],
        optimisers: Mapping[str, Optimizer],
        device: torch.device,
        mesh: DeviceMesh,
    ) -> None:
        self._stage, self._sharers = stage, mesh.get_group(mesh.ndim - 1)
        self._optimisers = dict(optimisers)
        self._whole: dict[nn.Parameter, DTensor] = {}  # part -> the tensor it belongs to
        names = {parameter: name for name, parameter in stage.named_parameters()}
        for network in networks:
            lists = [each for each in network.modules() if isinstance(each, nn.ModuleList)]
            for module in (*(block for blocks in lists for block in blocks), network):
                # The network's own parameters are resharded after its forward pass, too: averaging
                # and saving expect parts.
                fully_shard(module, mesh=mesh, reshard_after_forward=True)
        for tensor in (*stage.parameters(), *stage.buffers()):
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(device)
        now = dict(stage.named_parameters())
        for optimiser in self._optimisers.values():
            for group in optimiser.param_groups:
                group["params"] = [self._part(now[names[whole]]) for whole in group["params"]]
        # Autocast would keep a half-precision copy of each block until the last one has run.
        torch.set_autocast_cache_enabled(False)
        # The warning concerns in-place writers to an output; there are none.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")

    @torch.no_grad()
    def hand_over(self, optimiser: Optimizer) -> None:
        """Set the gradients of the parts after the last backward pass before a step.

        If a batch is processed in several parts, gradients are reduced after each part and
        accumulated as shards; reducing once would need whole gradients on each rank.
        """
        for part in parameters_of(optimiser):
            whole = self._whole.get(part)
            if whole is not None:
                part.grad = whole.grad.to_local() if isinstance(whole.grad, DTensor) else None
                whole.grad = None

    def gradient_norm(self, optimiser: Optimizer) -> Tensor:
        """Return the norm of an optimiser's gradients, 0-d, equal on all ranks."""
        own: list[Tensor] = []
        common: list[Tensor] = []
        for parameter in parameters_of(optimiser):
            if parameter.grad is not None:
                (own if parameter in self._whole else common).append(parameter.grad)
        squares = [get_total_norm(each, foreach=True).double().square() for each in (own, common)]
        return (sum_over_ranks(squares[0], self._sharers) + squares[1]).sqrt().to(own[0].dtype)

    def gather(self, state: CheckpointState) -> CheckpointState:
        """Gather a checkpoint as a single rank would have it; a collective call.

        The result is complete on rank 0 only, in main memory.

        Args:
            state: with ``stage`` and ``optimisers`` from their ``state_dict``.
        """
        stage = {
            name: whole_of(value) if isinstance(value, DTensor) else value
            for name, value in state["stage"].items()
        }

        def gathered(moment: Tensor, whole: DTensor) -> Tensor:
            return whole_of(as_part(moment, whole))

        optimisers = self._each_moment(state["optimisers"], gathered)
        return {**state, "stage": stage, "optimisers": optimisers}

    def deal(self, state: CheckpointState) -> CheckpointState:
        """Invert ``gather`` for a state that every rank has."""
        own = dict(self._stage.named_parameters())
        stage = {}
        for name, value in state["stage"].items():
            whole = own.get(name)
            if isinstance(whole, DTensor):
                value = dealt(value, whole)
            stage[name] = value

        def part_of(moment: Tensor, whole: DTensor) -> Tensor:
            return dealt(moment, whole).to_local().clone()  # not a view of the whole moment

        optimisers = self._each_moment(state["optimisers"], part_of)
        return {**state, "stage": stage, "optimisers": optimisers}

    def _part(self, whole: nn.Parameter) -> nn.Parameter:
        """Return the tensor that an optimiser steps: this rank's part, or the whole parameter."""
        if not isinstance(whole, DTensor):
            return whole
        with torch.no_grad():
            part = nn.Parameter(whole.to_local())
        self._whole[part] = whole
        return part

    def _each_moment(
        self, states: Mapping[str, Any], change: Callable[[Tensor, DTensor], Tensor]
    ) -> dict[str, Any]:
        """Apply a change to every entry of the optimisers' states with a parameter's shape."""
        changed = {}
        for name, optimiser in self._optimisers.items():
            state = dict(states[name]["state"])
            for number, parameter in enumerate(parameters_of(optimiser)):
                if parameter in self._whole and number in state:
                    whole = self._whole[parameter]
                    state[number] = {
                        kind: change(value, whole) if value.ndim else value  # 0-d: the step
                        for kind, value in state[number].items()
                    }
            changed[name] = {**states[name], "state": state}
        return changed


def as_part(part: Tensor, whole: DTensor) -> DTensor:
    """Wrap a rank's part as a DTensor with the shape and layout of ``whole``."""
    return DTensor.from_local(
        part,
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def dealt(value: Tensor, whole: DTensor) -> DTensor:
    """Lay out a value that every rank has as ``whole`` is, on its device, without communication."""
    return distribute_tensor(value, whole.device_mesh, whole.placements, src_data_rank=None)


def whole_of(parts: DTensor) -> Tensor:
    """Gather all parts on rank 0, in main memory; empty elsewhere. A collective call."""
    whole = parts.full_tensor()
    return whole.cpu() if rank() == 0 else whole.new_empty(0)
