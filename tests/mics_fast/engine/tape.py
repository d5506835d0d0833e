"""A CUDA graph imitated on a CPU: operators and addresses are recorded, Python is not.

The tape holds every operator that ran below autograd, with the very tensors it read and wrote. A
replay runs them again on these tensors: numbers computed by Python are frozen, and tensors that
Python has freed are still written. Operations that a graph cannot record raise an error.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")
HOST_COPIES = ("lift_fresh", "lift_fresh_copy")  # torch.tensor(...): a number travels to the device


class Tape(TorchDispatchMode):
    """Records within its context; ``rewind`` undoes what ran there, ``replay`` repeats it."""

    def __init__(self):
        super().__init__()
        self._calls, self._before, self._made = [], {}, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if waits_for_the_device(function, args):
            raise RuntimeError(f"{function} waits for the device")
        if name_of(function) in HOST_COPIES:
            raise RuntimeError(f"{function} copies a number of the host")
        for place, argument in enumerate(function._schema.arguments):
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(given)
        output = function(*args, **kwargs)
        if not gives_nothing_new(function):
            self._made |= {storage_of(made).data_ptr() for made in tensors_of(output)}
        if torch.Tag.inplace_view not in function.tags:  # squeeze_ and the like touch no memory
            self._calls.append((function, *tree_map(alias, (args, kwargs, output))))
        return output

    def rewind(self):
        """Restore the contents of all memory that existed before the recording."""
        for storage, contents in self._before.values():
            storage.copy_(contents)

    def replay(self):
        """Run it all again."""
        for function, args, kwargs, output in self._calls:
            again = function(*args, **kwargs)
            if not gives_nothing_new(function):
                for old, new in zip(tensors_of(output), tensors_of(again), strict=True):
                    old.copy_(new)

    def _keep(self, values):
        """Remember memory that is about to change, if it existed before the recording."""
        for tensor in tensors_of(values):
            storage = storage_of(tensor)
            if storage.data_ptr() not in self._made | self._before.keys():
                self._before[storage.data_ptr()] = storage, storage.clone()


def waits_for_the_device(function, args):
    """Return True if running an operator needs the host to read a value from the device."""
    name = name_of(function)
    by_mask = name in ("index", "index_put_") and any(
        isinstance(at, Tensor) and at.dtype == torch.bool for at in args[1]
    )
    return by_mask or any(name.lstrip("_").startswith(own.lstrip("_")) for own in WAITING)


def name_of(function):
    return function.__name__.split(".")[0]


def gives_nothing_new(function):
    """Return True if an operator's output is one of its inputs, or a view of one."""
    return any(result.alias_info for result in function._schema.returns)


def alias(value):
    """Return a tensor with the same memory and the current shape."""
    return value.detach() if isinstance(value, Tensor) else value


def tensors_of(values):
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def storage_of(tensor):
    return tensor.untyped_storage()


def record_tape(function):
    """A ``capture.Recorder``: as with a graph, recording leaves everything as it was."""
    tape = Tape()
    with tape:
        values = function()
    tape.rewind()
    return tape.replay, values
