"""Arbitrary arguments: an operator computes, or raises TypeError or ValueError; nothing else.

``MICS_FUZZ_SECONDS`` is the time in seconds for all operators together, a few by default;
``MICS_FUZZ_SEED`` chooses the examples.
"""

from __future__ import annotations

import importlib
import itertools
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import mics_kernels as mk
from mics_kernels.backends import explain

BUILT_IN = os.environ.get("MICS_NATIVE", "")  # `make fuzz-native`: where the sanitized build lies
SECONDS = float(os.environ.get("MICS_FUZZ_SECONDS", "8"))
SEED = int(os.environ.get("MICS_FUZZ_SEED", "0"))
EXAMPLES = 40  # between two looks at the clock

FLOATS = [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]
DTYPES = [
    *FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    torch.complex64, torch.complex128, torch.complex32, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip
Draw = Callable[[st.SearchStrategy[Any]], Any]


class Named(Tensor):
    """A subclass with memory of its own."""


def seldom(draw: Draw) -> bool:
    """Once in about twenty times."""
    return draw(st.integers(0, 19)) == 19


def values(
    draw: Draw, shape: tuple[int, ...], dtype: torch.dtype, low: float, high: float
) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.rand(shape, generator=generator) * (high - low) + low
    if x.numel() and seldom(draw):
        special = [float("nan"), float("inf"), -float("inf"), -1.0, 1e30, 2.0**62]
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = draw(st.sampled_from(special))
    if dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64):
        return x.to(dtype)
    return x.nan_to_num().clamp(-(2.0**62), 2.0**62).floor().to(torch.int64).to(dtype)


def laid_out(draw: Draw, x: Tensor) -> Tensor:
    """The same values with other strides, or another start."""
    how = draw(st.sampled_from(["plain", "plain", "permuted", "gaps", "offset", "expanded"]))
    if how == "permuted":
        return x.movedim(0, -1).contiguous().movedim(-1, 0) if x.dim() > 1 else x
    if how == "gaps":
        return torch.stack([x, x], -1)[..., 0]
    if how == "offset":
        return torch.cat([x.reshape(-1)[:0].new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    if how == "expanded" and x.dim() > 1 and len(x):
        return x[:1].expand(x.shape)
    return x


def disguised(draw: Draw, x: Tensor) -> Any:
    """Something that is no plain tensor, with the values of ``x``."""
    makers: list[Callable[[], Any]] = [
        lambda: x.as_subclass(Named),
        lambda: x.to_sparse(),
        lambda: x.to("meta"),
        lambda: torch.nn.Parameter(x) if x.is_floating_point() else x,
        lambda: torch.complex(x.float(), -x.float()).conj().imag.to(x.dtype),
        lambda: torch.complex(x.float(), -x.float()).conj().imag,
        lambda: torch._efficientzerotensor(x.shape, dtype=x.dtype),
        lambda: torch.nested.nested_tensor([x, x]),
        lambda: x.tolist(),
        lambda: x.detach().to(torch.float32).numpy(),
        lambda: None,
        lambda: "text",
    ]
    maker = draw(st.sampled_from(makers))
    try:
        return maker()
    except RuntimeError:  # torch makes no such tensor of this dtype
        return x


def tensor(
    draw: Draw,
    *shape: int,
    dtypes: list[torch.dtype] = FLOATS,
    low: float = -1.0,
    high: float = 1.0,
    may_need_gradient: bool = False,
) -> Any:
    """Mostly a tensor that will do; now and then with another shape, dtype or kind."""
    if seldom(draw):
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
    dtype = draw(st.sampled_from(DTYPES if seldom(draw) else dtypes))
    x = laid_out(draw, values(draw, shape, dtype, low, high))
    if (may_need_gradient or seldom(draw)) and x.is_floating_point() and draw(st.booleans()):
        x = x.detach().requires_grad_()
    return disguised(draw, x) if seldom(draw) else x


def maybe(draw: Draw, make: Callable[[], Any]) -> Any:
    return make() if draw(st.booleans()) else None


def number(draw: Draw, low: float, high: float) -> Any:
    if seldom(draw):
        odd = [float("nan"), float("inf"), -1.0, 0, 2**70, True, None, "1", [1.0], 1j]
        return draw(st.sampled_from(odd))
    value = draw(st.floats(low, high))
    return tensor(draw, low=value, high=value) if draw(st.integers(0, 3)) == 3 else value


def count(draw: Draw, high: int) -> Any:
    if seldom(draw):
        return draw(st.sampled_from([-1, 2**70, 1.5, True, None, "1"]))
    value = draw(st.integers(0, high))
    if draw(st.integers(0, 3)) == 3:
        return tensor(draw, dtypes=[torch.int64], low=value, high=value)
    return value


def labels(draw: Draw, rows: int, classes: int, ignored: int) -> Any:
    if draw(st.integers(0, 3)) == 3:
        return tensor(draw, rows, classes, low=0.0)
    return tensor(draw, rows, dtypes=[torch.int64], low=min(ignored, 0), high=classes)


def flags(draw: Draw, *shape: int) -> Any:
    return tensor(draw, *shape, dtypes=[torch.bool], low=0.0, high=1.9)


def ids(draw: Draw, rows: int) -> Any:
    return tensor(draw, rows, dtypes=[torch.int64], low=-2.0, high=5.0)


def options(draw: Draw, *, reduces: bool = True) -> dict[str, Any]:
    chosen = {"backend": draw(st.sampled_from([None, None, None, "reference", "cpu", "no", 3]))}
    if reduces:
        chosen["reduction"] = draw(st.sampled_from(["mean", "sum", "none", "none", "max", None]))
    return chosen


def sizes(draw: Draw, n: int) -> list[int]:
    return [draw(st.integers(0, 9) if seldom(draw) else st.integers(1, 9)) for _ in range(n)]


def call_evidential_loss(draw: Draw) -> Any:
    rows, views, classes = sizes(draw, 3)
    shape = (rows, views, classes) if draw(st.booleans()) else (rows, classes)
    return mk.evidential_loss(
        tensor(draw, *shape, low=0.0, high=9.0, may_need_gradient=True),
        labels(draw, rows, classes, -1),
        kl_weight=number(draw, 0.0, 2.0),
        present=maybe(draw, lambda: flags(draw, rows, views)),
        weight=maybe(draw, lambda: tensor(draw, rows)),
        ignore_index=draw(st.sampled_from([-1, -1, -100, 2**70, None, 1.0])),
        **options(draw),
    )


def call_evidential_fusion_loss(draw: Draw) -> Any:
    rows, views, classes = sizes(draw, 3)
    return mk.evidential_fusion_loss(
        tensor(draw, rows, views, classes, high=5.0, may_need_gradient=True),
        labels(draw, rows, classes, -1),
        kl_weight=number(draw, 0.0, 2.0),
        activation=draw(st.sampled_from(["softplus", "exp", "relu", "gelu", None])),
        present=maybe(draw, lambda: flags(draw, rows, views)),
        weight=maybe(draw, lambda: tensor(draw, rows)),
        ignore_index=-1,
        **options(draw),
    ).loss


def call_fuse_evidence(draw: Draw) -> Any:
    rows, views, classes = sizes(draw, 3)
    return mk.fuse_evidence(
        tensor(draw, rows, views, classes, low=0.0, high=9.0, may_need_gradient=True),
        present=maybe(draw, lambda: flags(draw, rows, views)),
        **options(draw, reduces=False),
    )


def call_conflict(draw: Draw) -> Any:
    rows, views, classes = sizes(draw, 3)
    evidence = tensor(draw, rows, views, classes, low=0.0, high=9.0, may_need_gradient=True)
    mk.opinion(evidence)
    return mk.conflict(evidence, present=maybe(draw, lambda: flags(draw, rows, views)))


def call_consistency_loss(draw: Draw) -> Any:
    rows, width, queue = sizes(draw, 3)
    keys = rows + draw(st.integers(0, 3))
    return mk.consistency_loss(
        tensor(draw, rows, width, may_need_gradient=True),
        tensor(draw, rows, width),
        tensor(draw, keys, width),
        maybe(draw, lambda: tensor(draw, queue, width)),
        temperature=number(draw, 0.01, 2.0),
        alpha=number(draw, 0.0, 1.0),
        queue_length=maybe(draw, lambda: count(draw, queue)),
        key_ids=maybe(draw, lambda: ids(draw, keys)),
        queue_ids=maybe(draw, lambda: ids(draw, queue)),
        **options(draw),
    )


def call_multimodal_consistency_loss(draw: Draw) -> Any:
    rows, width, queue = sizes(draw, 3)
    keys, views = rows + draw(st.integers(0, 3)), draw(st.integers(1, 3))

    def each(make: Callable[[], Any]) -> Any:
        if seldom(draw):
            return make()
        return [make() for _ in range(draw(st.integers(0, 3)) if seldom(draw) else views)]

    return mk.multimodal_consistency_loss(
        each(lambda: tensor(draw, rows, width, dtypes=FLOATS[:1], may_need_gradient=True)),
        each(lambda: tensor(draw, rows, width)),
        maybe(draw, lambda: each(lambda: tensor(draw, queue, width))),
        keys=maybe(draw, lambda: each(lambda: tensor(draw, keys, width))),
        temperature=number(draw, 0.01, 2.0),
        alpha=number(draw, 0.0, 1.0),
        queue_lengths=maybe(draw, lambda: each(lambda: count(draw, queue))),
        key_ids=maybe(draw, lambda: ids(draw, keys)),
        queue_ids=maybe(draw, lambda: each(lambda: ids(draw, queue))),
        present=maybe(draw, lambda: flags(draw, draw(st.sampled_from([rows, keys])), views)),
        pairs=maybe(
            draw,
            lambda: draw(
                st.lists(st.tuples(st.integers(-1, views), st.integers(0, views - 1)), max_size=4)
            ),
        ),
        **options(draw),
    )


def call_class_moments(draw: Draw) -> Any:
    rows, width, classes = sizes(draw, 3)
    return mk.class_moments(
        tensor(draw, rows, width, may_need_gradient=True),
        labels(draw, rows, classes, -1),
        draw(st.sampled_from([0, -1, 1.5, None, "2"])) if seldom(draw) else classes,
        weight=maybe(draw, lambda: tensor(draw, rows, low=0.0)),
        **options(draw, reduces=False),
    ).m2


def call_shift_features(draw: Draw) -> Any:
    rows, width, classes, rank = sizes(draw, 4)
    strength = tensor(draw, rows, low=0.0) if draw(st.booleans()) else number(draw, 0.0, 2.0)
    return mk.shift_features(
        tensor(draw, rows, width, may_need_gradient=True),
        labels(draw, rows, classes, -1),
        maybe(draw, lambda: tensor(draw, classes, width, low=0.0)),
        strength=strength,
        seed=tensor(draw, 2, dtypes=[torch.int64], low=-(2.0**40), high=2.0**40),
        row_ids=maybe(draw, lambda: ids(draw, rows)),
        directions=maybe(draw, lambda: tensor(draw, classes, rank, width)),
        **options(draw, reduces=False),
    )


def call_shifted_cross_entropy(draw: Draw) -> Any:
    rows, width, classes, rank = sizes(draw, 4)
    strength = tensor(draw, rows, low=0.0) if draw(st.booleans()) else number(draw, 0.0, 2.0)
    return mk.shifted_cross_entropy(
        tensor(draw, rows, classes, may_need_gradient=True),
        labels(draw, rows, classes, -1),
        tensor(draw, classes, width, may_need_gradient=True),
        maybe(draw, lambda: tensor(draw, classes, width, low=0.0)),
        strength=strength,
        directions=maybe(draw, lambda: tensor(draw, classes, rank, width)),
        **options(draw),
    )


def call_modules(draw: Draw) -> Any:
    rows, width, classes, rank = sizes(draw, 4)
    statistics = mk.ClassStatistics(
        classes, width, momentum=draw(st.sampled_from([None, 0.5])), rank=rank - 1
    )
    statistics.update(
        tensor(draw, rows, width),
        labels(draw, rows, classes, -1),
        maybe(draw, lambda: tensor(draw, rows, low=0.0)),
    )
    statistics.directions()
    queue = mk.FeatureQueue(rank, width)
    queue.enqueue(
        tensor(draw, rows, width),
        maybe(draw, lambda: ids(draw, rows)),
        maybe(draw, lambda: flags(draw, rows)),
    )
    return statistics.variance()


CALLS = [
    call_evidential_loss,
    call_evidential_fusion_loss,
    call_fuse_evidence,
    call_conflict,
    call_consistency_loss,
    call_multimodal_consistency_loss,
    call_class_moments,
    call_shift_features,
    call_shifted_cross_entropy,
    call_modules,
]


def cannot_run_here(error: RuntimeError) -> bool:
    """A backend that was asked for by name and does not serve the tensor says so this way."""
    return "backend argument asks for" in str(error)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__.removeprefix("call_"))
def test_arguments_are_computed_with_or_refused(call: Callable[[Draw], Any]) -> None:
    outcomes = {"computed": 0, "refused": 0}

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, print_blob=True,
        phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        try:
            result = call(data.draw)
            if result.requires_grad and not result.is_meta:  # torch's prod looks at values
                result.float().sum().backward()
            outcomes["computed"] += 1
        except (TypeError, ValueError):
            outcomes["refused"] += 1
        except RuntimeError as error:
            if not cannot_run_here(error):
                raise

    assert explain("consistency", torch.zeros(1, 1)).backend == "cpu"
    module = importlib.import_module("mics_kernels._native")
    assert (module.__file__ or "").startswith(BUILT_IN), module.__file__
    end = time.monotonic() + SECONDS / len(CALLS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of sparse and nested prototypes
        for number in itertools.count(SEED):  # the same examples in every run
            seed(number)(attempt)()
            if time.monotonic() > end and all(outcomes.values()):
                break
    print(outcomes)  # shown by `make fuzz`
