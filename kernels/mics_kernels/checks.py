"""Checks of arguments. An error is one sentence: the argument, what was given, what is wanted.

Shape, dtype, layout and device are always checked. Values are checked on Python numbers and CPU
tensors; on a GPU, where reading a value costs a host sync, only with ``MICS_KERNELS_CHECK=1``.
Values cannot be checked while code is traced or transformed (torch.compile, make_fx, vmap, ...).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from mics_kernels.addresses import is_intercepted, is_plain, is_transformed

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABELS = (torch.int64,)
FLAGS = (torch.bool,)


def check_tensor(
    name: str,
    value: object,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype] = FLOATS,
    device: torch.device | None = None,
) -> None:
    """Check type, shape, dtype and device of an argument.

    Args:
        name: name of the argument in the public function.
        value: the argument.
        shape: one entry per dimension: a size, or a letter for any size.
        dtypes: accepted dtypes.
        device: required device; None accepts any.

    Raises:
        TypeError: no tensor, another layout, or another dtype.
        ValueError: another shape or device.
    """
    if not isinstance(value, Tensor) or type(value).__name__ == "DTensor":
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else _plain(value.layout)
        raise TypeError(f"{name} must be a dense tensor, got layout {layout}")
    if not _fits(value.shape, shape):
        raise ValueError(f"{name} must have shape {_shape(shape)}, got {_shape(value.shape)}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {_either(dtypes)}, got {_plain(value.dtype)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors, got {value.device}")


def shape_of(value: object) -> tuple[int, ...]:
    """Return the shape of a dense tensor; () for anything else, which ``check_tensor`` refuses."""
    if isinstance(value, Tensor) and not value.is_nested:  # a nested one has no shape to read
        return tuple(value.shape)
    return ()


def check_number(
    name: str, value: object, low: float, high: float = float("inf"), *, above: bool = False
) -> None:
    """Check a Python number in [low, high], or in (low, high] if ``above``.

    Raises:
        TypeError: not a number.
        ValueError: outside the range, NaN, or an int that torch cannot hold.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit into 64 bits, got {value}")
    if not (value > low if above else value >= low) or not value <= high:
        raise ValueError(f"{name} must be {_range(low, high, above)}, got {value}")


def check_scalar(name: str, value: object, low: float, high: float, device: torch.device) -> None:
    """Check a number in [low, high]: a Python number, or a 0-d tensor without gradient.

    Raises:
        TypeError: neither of them, or another dtype.
        ValueError: outside the range, another device, or the tensor requires a gradient.
    """
    if not isinstance(value, Tensor):
        check_number(name, value, low, high)
        return
    check_tensor(name, value, (), FLOATS, device)
    check_constant(name, value)
    check_values(name, value, low, high)


def check_whole(name: str, value: object, low: int, high: float = float("inf")) -> None:
    """Check a Python int in [low, high].

    Raises:
        TypeError: not an int.
        ValueError: outside the range.
    """
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    check_number(name, value, low, high)


def check_not_empty(name: str, value: Tensor, dimension: int, what: str) -> None:
    """Check that a dimension holds at least one entry.

    Raises:
        ValueError: its size is 0.
    """
    if value.shape[dimension] < 1:
        raise ValueError(f"{name} must hold at least one {what}, got shape {_shape(value.shape)}")


def check_values(
    name: str,
    value: Tensor,
    low: float,
    high: float = float("inf"),
    *,
    above: bool = False,
    where: Tensor | None = None,
) -> None:
    """Check that all elements are in [low, high]; NaN passes, and shows in the result.

    Args:
        name: name of the argument in the public function.
        value: tensor of any shape.
        low: smallest allowed value.
        high: largest allowed value.
        above: exclude ``low`` itself.
        where: bool, broadcastable to ``value``; elements marked False are not checked.

    Raises:
        ValueError: an element is outside.
    """
    if not looks_at_values(value) or _all_inside(value, low, high, above):
        return
    outside = (value > high) | ((value <= low) if above else (value < low))
    if where is not None:
        outside = outside & where
    if outside.any():
        worst = value[outside][0].item()
        raise ValueError(f"{name} must be {_range(low, high, above)}, got {worst}")


def check_target(
    name: str, target: object, rows: int, classes: int, device: torch.device, ignored: int
) -> None:
    """Check a target: (B,) int64 labels in [0, C) or ``ignored``, or (B, C) probabilities.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device, a label or a probability out of range, or
            probabilities that require a gradient.
    """
    if isinstance(target, Tensor) and target.dim() == 2:
        check_tensor(name, target, (rows, classes), FLOATS, device)
        check_constant(name, target)
        check_values(name, target, 0.0, 1.0)
        return
    check_tensor(name, target, (rows,), LABELS, device)
    assert isinstance(target, Tensor)
    least = -1 if ignored == -1 else 0  # then the labels and the ignored one adjoin
    if looks_at_values(target) and not _all_inside(target, least, classes - 1):
        wrong = ((target < 0) | (target >= classes)) & (target != ignored)
        if wrong.any():
            row = int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"{name} must hold labels in [0, {classes}), or {ignored} for a row to skip, "
                f"got {int(target[row])} in row {row}"
            )


def check_constant(name: str, value: Tensor) -> None:
    """Refuse a tensor that requires a gradient and gets none.

    Raises:
        ValueError: it requires a gradient, and gradients are being recorded.
    """
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires a gradient, but this operator gives none to it: pass {name}.detach()"
        )


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check that a value is one of ``choices``.

    Raises:
        ValueError: it is none of them.
    """
    if value not in choices:
        raise ValueError(f"{name} must be {_either([repr(c) for c in choices])}, got {value!r}")


def _fits(given: Sequence[int], wanted: Sequence[int | str]) -> bool:
    if len(given) != len(wanted):
        return False
    for size, want in zip(given, wanted, strict=True):  # a loop: this runs at every call
        if not isinstance(want, str) and size != want:
            return False
    return True


def looks_at_values(value: Tensor) -> bool:
    """Return True if checking values neither synchronises with a device nor breaks a graph."""
    if torch.compiler.is_compiling():
        return False
    if value.device.type != "cpu" and os.environ.get("MICS_KERNELS_CHECK") != "1":
        return False
    return not is_transformed() and not is_intercepted() and is_plain(value)


def _all_inside(value: Tensor, low: float, high: float, above: bool = False) -> bool:
    """Return True if all elements are inside (NaN never is), in one pass without a copy."""
    if value.numel() == 0:
        return True
    least, most = (bound.item() for bound in value.aminmax())
    return (least > low if above else least >= low) and most <= high


def _range(low: float, high: float, above: bool) -> str:
    if high < float("inf"):
        return f"in {'(' if above else '['}{low:g}, {high:g}]"
    return f"{'>' if above else '>='} {low:g}"


def _shape(sizes: Sequence[int | str]) -> str:
    return f"({', '.join(str(size) for size in sizes)}{',' if len(sizes) == 1 else ''})"


def _either(choices: Sequence[object]) -> str:
    names = [_plain(choice) for choice in choices]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _plain(choice: object) -> str:
    return str(choice).removeprefix("torch.")
