"""Operators: one record of inputs each, registered with torch, called directly where possible.

A call through torch's dispatcher costs more than a small kernel. On plain tensors in eager mode an
operator therefore runs in a bare ``autograd.Function``, or in none where no gradient is wanted.
Everything else takes a slower path that torch understands: ``torch.compile``, tracers, dispatch
modes and subclasses get the registered form, functorch transforms (grad, vmap, jacrev) an
``autograd.Function`` they can transform. Forward-mode differentiation is refused.

The registered forms, ``torch.ops.mics_kernels.*``, are private: they rely on the checks of the
public functions. torch keeps compiled graphs on disk, by these names only: an operator whose
arguments, or those of its gradient, change gets a new name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any, Generic, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

from mics_kernels.addresses import is_intercepted, is_plain, is_transformed

Number = float | Tensor
"""A number, or a tensor that holds one; some operators also take one number per row."""

Inputs = TypeVar("Inputs", bound="tuple[Any, ...]")
Results = TypeVar("Results", bound="Tensor | tuple[Tensor, ...]")
Gradients = Mapping[str, "Tensor | list[Tensor | None] | None"]
Layout = list[tuple[str, int | None]]  # fields that get gradients back; of lists, their lengths

_library = torch.library.Library("mics_kernels", "FRAGMENT")

_COUNTS = list[int | Tensor]
_SCHEMA: dict[Any, str] = {  # annotation of a field -> type of the registered operator's argument
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    Number: "Tensor",
    _COUNTS: "Tensor[]",
    int: "int",
    list[int]: "int[]",
    bool: "bool",
    str: "str",
    str | None: "str?",
}


class Operator(Generic[Inputs, Results]):
    """An operator of ``torch.ops.mics_kernels``, and the direct ways to call it.

    Args:
        name: registered name.
        inputs: record of the inputs, a NamedTuple whose fields are the arguments of the schema. Its
            field ``want_gradient``, where it has one, is set here.
        results: NamedTuple of tensors, or Tensor.
        run: computes the results of a record, on any device.
        shapes: makes empty results with the same shapes, dtypes and strides.
        save: keeps what ``backward`` needs; takes ctx, record and results.
        backward: takes ctx and the gradient of the first result; returns gradients by field.
        differentiable: fields that get a gradient: tensors, or lists of tensors.
        slopes: results that ``backward`` scales. All others except the first are constants.
    """

    def __init__(
        self,
        name: str,
        inputs: type[Inputs],
        results: type[Results],
        *,
        run: Callable[[Inputs], Results],
        shapes: Callable[[Inputs], Results],
        save: Callable[[Any, Inputs, Results], None],
        backward: Callable[[Any, Tensor], Gradients],
        differentiable: tuple[str, ...] = (),
        slopes: tuple[str, ...] = (),
    ) -> None:
        self.run, self.save, self.backward = run, save, backward
        self.differentiable, self.slopes = differentiable, slopes
        self.inputs, self.results = inputs, results
        kinds: dict[str, Any] = get_type_hints(inputs)
        self.fields = tuple(kinds)
        self._numbers = {field for field, kind in kinds.items() if kind == Number}
        self._counts = {field for field, kind in kinds.items() if kind == _COUNTS}
        self._tensor_lists = {field for field, kind in kinds.items() if _SCHEMA[kind] == "Tensor[]"}
        arguments = ", ".join(f"{_SCHEMA[kind]} {field}" for field, kind in kinds.items())
        outputs = ["Tensor"] * (1 if results is Tensor else len(get_type_hints(results)))
        _library.define(f"{name}({arguments}) -> ({', '.join(outputs)})")
        _library.impl(name, lambda *fields: run(inputs(*fields)), "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"mics_kernels::{name}", lambda *fields: shapes(inputs(*fields)), lib=_library
        )
        torch.library.register_autograd(
            f"mics_kernels::{name}",
            _backward_of_registered,
            setup_context=self._remember_registered,
            lib=_library,
        )
        self._registered = getattr(torch.ops.mics_kernels, name).default

    def __call__(self, inputs: Inputs) -> Results:
        """Compute the results of a record, whose fields the caller has checked."""
        if torch.compiler.is_compiling():
            return self._call_registered(self._wanting(inputs, self._needs_gradient(inputs)))
        if is_transformed() or forward_ad._current_level >= 0:
            inputs = self._wanting(inputs, torch.is_grad_enabled())
            return self._named(_Transformed.apply(self, inputs, *_tensors(inputs)))
        if not has_addresses(inputs):
            return self._call_registered(self._wanting(inputs, torch.is_grad_enabled()))
        tensors = self._differentiable(inputs) if torch.is_grad_enabled() else []
        if not any(tensor.requires_grad for tensor in tensors):
            return self.run(inputs)
        return self._named(_Direct.apply(self, self._wanting(inputs, True), *tensors))

    def call_below_autograd(self, inputs: Inputs) -> Results:
        """Compute the results without recording a graph."""
        return self.run(inputs) if has_addresses(inputs) else self._call_registered(inputs)

    def remember(self, ctx: Any, inputs: Inputs, results: Any, layout: Layout) -> None:
        """Keep what the backward pass needs, and which gradients it returns in which order."""
        ctx.operator, ctx.layout = self, layout
        ctx.set_materialize_grads(False)
        self.save(ctx, inputs, self._named(results))

    def constants(self, results: Any) -> list[Tensor]:
        """Return the results that have no gradient."""
        if self.results is Tensor:
            return []
        named = self._named(results)._asdict()
        return [value for name, value in list(named.items())[1:] if name not in self.slopes]

    def _call_registered(self, inputs: Inputs) -> Results:
        # Numbers as tensors: those of a schema are constants of the graph, and one that changes
        # from step to step would be compiled anew at every step.
        device = _tensors(inputs)[0].device
        fields: list[Any] = []
        for field, value in zip(self.fields, inputs, strict=True):
            if field in self._numbers:
                value = _as_tensor(value, torch.float32, device)
            elif field in self._counts:
                value = [_as_tensor(count, torch.int64, device) for count in value]
            fields.append(value)
        return self._named(self._registered(*fields))

    def _remember_registered(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        layout: Layout = [
            (field, len(value) if field in self._tensor_lists else None)
            for field, value in zip(self.fields, inputs, strict=True)
        ]
        self.remember(ctx, self.inputs(*inputs), output, layout)
        if isinstance(output, tuple):
            ctx.mark_non_differentiable(*output[1:])

    def _differentiable(self, inputs: Inputs) -> list[Tensor]:
        return _tensors([getattr(inputs, field) for field in self.differentiable])

    def _needs_gradient(self, inputs: Inputs) -> bool:
        needed = any(tensor.requires_grad for tensor in self._differentiable(inputs))
        return needed and torch.is_grad_enabled()

    def _wanting(self, inputs: Inputs, wanted: bool) -> Inputs:
        if wanted and "want_gradient" in self.fields:
            return inputs._replace(want_gradient=True)  # type: ignore[attr-defined]
        return inputs

    def _named(self, results: Any) -> Any:
        return results if self.results is Tensor else self.results(*results)


class _Direct(torch.autograd.Function):
    """An operator on plain tensors."""

    # No setup_context: torch would bind the arguments to their names at every call, which takes
    # longer than a small batch.
    @staticmethod
    def forward(ctx: Any, operator: Operator[Any, Any], inputs: Any, *tensors: Tensor) -> Any:
        results = operator.run(inputs)
        operator.remember(ctx, inputs, results, _layout(inputs, operator.differentiable))
        if isinstance(results, tuple):
            ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Any, ...]:
        return None, None, *_flat(_gradients(ctx, outer), ctx.layout)


class _Transformed(torch.autograd.Function):
    """An operator under functorch's transforms; ``tensors`` are all those of the record."""

    @staticmethod
    def forward(operator: Operator[Any, Any], inputs: Any, *tensors: Tensor) -> Any:
        return operator.call_below_autograd(inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        operator, record, *_ = inputs
        operator.remember(ctx, record, output, _layout(record, record._fields))
        # Not the slopes: their derivative is asked for where a gradient is differentiated again.
        ctx.mark_non_differentiable(*operator.constants(output))

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Any, ...]:
        return None, None, *_flat(_gradients(ctx, outer), ctx.layout)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise NotImplementedError(
            "this operator has no forward-mode derivative (jvp, jacfwd, make_dual): "
            'use backend="reference"'
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, operator: Operator[Any, Any], inputs: Any, *_: Any) -> Any:
        """Call the operator once per entry of the batch."""
        dims = in_dims[1]

        def entry(index: int) -> Any:
            return tree_map(
                lambda value, dim: value if dim is None else value.select(dim, index), inputs, dims
            )

        results = [operator(entry(index)) for index in range(info.batch_size)]
        stacked = tree_map(lambda *entries: torch.stack(entries), *results)
        return stacked, tree_map(lambda _: 0, stacked)


def _gradients(ctx: Any, outer: tuple[Tensor | None, ...]) -> Gradients:
    first, *others = outer
    if any(other is not None for other in others):
        raise RuntimeError(_ONCE)
    return {} if first is None else ctx.operator.backward(ctx, first)


def _backward_of_registered(ctx: Any, *outer: Tensor | None) -> tuple[Any, ...]:
    gradients = _gradients(ctx, outer)
    nothing = {field: None if length is None else [None] * length for field, length in ctx.layout}
    return tuple({**nothing, **gradients}.values())


def _layout(inputs: Any, fields: Iterable[str]) -> Layout:
    layout: Layout = []
    for field in fields:
        value = getattr(inputs, field)
        if isinstance(value, Tensor):
            layout.append((field, None))
        elif isinstance(value, list):
            layout.append((field, len(_tensors(value))))
    return layout


def _flat(gradients: Gradients, layout: Layout) -> Iterator[Tensor | None]:
    for field, length in layout:
        gradient: Any = gradients.get(field)
        if length is None:
            yield gradient
        else:
            yield from [None] * length if gradient is None else gradient


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among values and in lists among them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list):
            found += _tensors(value)
    return found


def has_addresses(inputs: Iterable[Any]) -> bool:
    """Return True if compiled kernels can read all tensors among the inputs."""
    return not is_intercepted() and all(map(is_plain, _tensors(inputs)))


def _as_tensor(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.ones((), dtype=dtype, device=device) * value  # torch.full would be a constant


_ONCE = (
    "the gradient of this operator cannot be differentiated again (create_graph=True): "
    'use backend="reference"'
)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse ``create_graph=True``.

    torch's ``once_differentiable`` does not notice where only the inputs ask for it: the second
    derivative would silently be zero. functorch sets ``create_graph`` always; there the slopes,
    which are results, notice.
    """

    @wraps(backward)
    def checked(ctx: Any, outer: Tensor) -> Any:
        if torch.is_grad_enabled() and not is_transformed():
            raise RuntimeError(_ONCE)
        return backward(ctx, outer)

    return checked


def refuse_gradient(ctx: Any, outer: Tensor) -> Gradients:
    """``backward`` of operators that run in a backward pass themselves."""
    raise RuntimeError(_ONCE)


def save_nothing(ctx: Any, inputs: Any, results: Any) -> None:
    """``save`` of operators whose backward pass needs nothing."""
