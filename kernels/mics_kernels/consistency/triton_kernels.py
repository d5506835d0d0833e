"""The consistency losses in Triton; the formulas are those of README.md beside this file.

Student and teacher features of a query are two rows of one tile. A tile of keys is loaded once and
serves the products of both and, where gradients are wanted, both sums of keys:

    products (M, N) = rows (M, D) . keys (N, D)
    pulls    (M, D) = softmax(products / T) . keys

The keys and the filled part of the queue are cut into splits, which programs sweep independently,
with a running maximum. A second kernel joins the splits in a fixed order.

Rows of a tile come in slabs of 16: eight students, then their eight teachers. A tensor core keeps
rows i and i + 8 in the same registers, so that a student's products meet its teacher's
probabilities at no cost. Losses and temperature gradients come from those float32 products, not
from the sums of keys, whose probabilities are rounded to the dtype of the keys.
"""

# The compiler types the arguments of kernels; annotations mean tl.constexpr.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mics_kernels.consistency.records import ConsistencyInputs, ConsistencyResults
from mics_kernels.triton_common import (
    cdiv,
    chip_of,
    dense,
    device_of,
    launch,
    next_power_of_2,
)

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _of(values, chosen):
    """values[chosen] of a tuple, by selects of scalars, which preserve known alignment."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(chosen == i, values[i], value)
    return value


@triton.jit
def _number(value, IN_MEMORY: tl.constexpr):
    if IN_MEMORY:
        value = tl.load(value).to(tl.float32)
    return value


@triton.jit
def _counts(query, rows, key_ids, step, a, b, HAS_IDS: tl.constexpr):
    """Flags of queries with both modalities and a readable positive, and their ids."""
    counts = query < rows
    own_id = query.to(tl.int64)
    if HAS_IDS:
        place = key_ids + own_id
        own = tl.load(place + tl.cast(a, tl.int64) * step, mask=counts, other=-1)
        own_id = tl.load(place + tl.cast(b, tl.int64) * step, mask=counts, other=-1)
        counts = counts & (own >= 0) & (own_id >= 0)
    return counts, own_id


@triton.jit
def _add_product(total, a, b, PRECISION: tl.constexpr):
    """total + a . b, in float32."""
    if _INTERPRETED:  # the interpreter would multiply the bit patterns of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _under_student(p, products, M: tl.constexpr, N: tl.constexpr):
    """For each row, the sum over keys of p times the product of student and key, (M,)."""
    shape: tl.constexpr = (M // 16, 2, 8, N)
    student = (tl.arange(0, 2) == 0)[None, :, None, None]
    students = tl.where(student, tl.reshape(products, shape), 0.0)
    students = tl.sum(students, 1, keep_dims=True)
    return tl.reshape(tl.sum(tl.reshape(p, shape) * students, 3), (M,))


@triton.jit
def _ids_of_tile(ids, tile, length, N: tl.constexpr):
    """Ids of a tile of keys (N,), negative for keys that must not be read."""
    slot = tl.arange(0, N)
    place = tl.cast(tile, tl.int64) * N + slot
    return tl.load(ids + place, mask=slot < length - tile * N, other=-1)


@triton.jit
def _sweep(
    queries, query, own_id, features, ids, first, last, length, scale,
    peak, total, mixed, positive, pull,
    D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_POSITIVES: tl.constexpr, GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles ``first`` to ``last`` of ``features`` (length, D), joined to the running sums.

    With s the product of row and key, and scale = log2(e) / T. peak: largest s so far;
    total: sum of p = 2 ** (scale (s - peak)); mixed: sum of p times the student's s;
    positive: s of the positive, all (M,); pull (M, DP): sum of p times key.
    """
    slot = tl.arange(0, N)
    column = tl.arange(0, DP)
    if HAS_IDS:
        next_id = _ids_of_tile(ids, first, length, N)
    for tile in range(first, last):
        readable = slot < length - tile * N
        if HAS_IDS:
            # Read one tile ahead, so that the loads of features, which depend on it, can be, too.
            key_id = next_id
            next_id = _ids_of_tile(ids, tile + 1, length, N)
            readable = key_id >= 0
        place = tl.cast(tile, tl.int64) * N + slot
        mask = readable[:, None] & (column < D)[None, :]
        keys = tl.load(features + place[:, None] * D + column[None, :], mask=mask, other=0.0)
        keys = keys.to(queries.dtype)
        products = tl.zeros((M, N), tl.float32)
        products = _add_product(products, queries, tl.trans(keys), PRECISION)
        allowed = readable[None, :]
        if HAS_POSITIVES:
            own_key = (query - tile * N)[:, None] == slot[None, :]
            positive += tl.sum(tl.where(own_key, products, 0.0), 1)
        if HAS_IDS:
            repeat = own_id[:, None] == key_id[None, :]
            if HAS_POSITIVES:
                repeat = repeat & ~own_key
            allowed = allowed & ~repeat
        # Scaled in float32 after the product, and above the mask: -inf * scale is -inf.
        masked = tl.where(allowed, products, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(masked, 1))
        # Scaled after the difference: in scale s - scale peak a GPU rounds only one product, and
        # an old sum would shrink or grow with every tile without a new peak.
        top = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2((masked - top[:, None]) * scale)
        fade = tl.exp2((peak - top) * scale)
        total = total * fade + tl.sum(p, 1)
        mixed = mixed * fade + _under_student(p, products, M, N)
        if GRADIENT:
            pull = _add_product(pull * fade[:, None], p.to(keys.dtype), keys, PRECISION)
        peak = new_peak
    return peak, total, mixed, positive, pull


@triton.jit(
    do_not_specialize=["temperature", "ids_step", "rows", "key_rows", "queue_rows", "splits"]
)
def sweep_kernel(
    students, teachers, keys, queues, lengths, key_ids, queue_ids, sums, pulls,
    temperature, ids_step, rows, key_rows, queue_rows, splits,
    A: tl.constexpr, B: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
    HAS_QUEUE: tl.constexpr, HAS_LENGTHS: tl.constexpr, LENGTHS_IN_MEMORY: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_QUEUE_IDS: tl.constexpr,
    TEMPERATURE_IN_MEMORY: tl.constexpr, GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tuples of students, teachers (rows, D), keys (key_rows, D), queues (queue_rows, D) ->
    sums (P, splits, 4, 2, rows) = peak, total, mixed and positive of student and teacher, and
    pulls (P, splits, 2, rows, D); see ``_sweep``.

    Pair p is of the views A[p] (queries) and B[p] (keys); the ids of keys of view v start at
    key_ids + v * ids_step.
    """
    split = tl.program_id(1)
    pair = tl.program_id(2)
    a = _of(A, pair)
    b = _of(B, pair)
    slot = tl.arange(0, M)
    is_teacher = slot // 8 % 2
    query = tl.program_id(0) * (M // 2) + slot // 16 * 8 + slot % 8
    counts, own_id = _counts(query, rows, key_ids, ids_step, a, b, HAS_IDS)
    column = tl.arange(0, DP)
    place = query.to(tl.int64)[:, None] * D + column[None, :]
    # One load, so that a tensor core can read the tile straight from shared memory.
    source = tl.where(is_teacher[:, None] == 1, _of(teachers, a) + place, _of(students, a) + place)
    queries = tl.load(source, mask=counts[:, None] & (column < D)[None, :], other=0.0)
    scale = _LOG2_E / _number(temperature, TEMPERATURE_IN_MEMORY)

    peak = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    mixed = tl.zeros((M,), tl.float32)
    positive = tl.zeros((M,), tl.float32)
    pull = tl.zeros((M, DP if GRADIENT else 1), tl.float32)
    # Splits share the tiles of the keys, then those of the queue.
    key_tiles = tl.cdiv(key_rows, N)
    tiles = key_tiles
    if HAS_QUEUE:
        length = queue_rows
        if HAS_LENGTHS:
            length = _of(lengths, b)
            length = tl.load(length) if LENGTHS_IN_MEMORY else (length.to(tl.int64) - 3) // 2
            length = tl.minimum(tl.maximum(length, 0), queue_rows).to(tl.int32)  # whatever it says
        tiles += tl.cdiv(length, N)
    share = tl.cdiv(tiles, splits)
    first = tl.minimum(split * share, tiles)
    last = tl.minimum(first + share, tiles)
    ids = key_ids
    if HAS_IDS:
        ids += tl.cast(b, tl.int64) * ids_step
    peak, total, mixed, positive, pull = _sweep(
        queries, query, own_id, _of(keys, b), ids,
        tl.minimum(first, key_tiles), tl.minimum(last, key_tiles), key_rows, scale,
        peak, total, mixed, positive, pull,
        D, DP, M, N, HAS_IDS, True, GRADIENT, PRECISION,
    )  # fmt: skip
    if HAS_QUEUE:
        if HAS_QUEUE_IDS:
            ids = _of(queue_ids, b)
        peak, total, mixed, positive, pull = _sweep(
            queries, query, own_id, _of(queues, b), ids,
            tl.maximum(first - key_tiles, 0), tl.maximum(last - key_tiles, 0), length, scale,
            peak, total, mixed, positive, pull,
            D, DP, M, N, HAS_QUEUE_IDS, False, GRADIENT, PRECISION,
        )  # fmt: skip

    part = pair.to(tl.int64) * splits + split
    row = is_teacher * rows.to(tl.int64) + query
    inside = query < rows
    sums += part * 8 * rows + row
    tl.store(sums, peak, mask=inside)
    tl.store(sums + 2 * rows, total, mask=inside)
    tl.store(sums + 4 * rows, mixed, mask=inside)
    tl.store(sums + 6 * rows, positive, mask=inside)
    if GRADIENT:
        place = (part * 2 * rows + row)[:, None] * D + column[None, :]
        tl.store(pulls + place, pull, mask=inside[:, None] & (column < D)[None, :])


@triton.jit
def _joined(sums, scale, rows, splits, S: tl.constexpr):
    """Peak, total, mixed and positive of one row over all splits."""
    split = tl.arange(0, S)
    inside = split < splits
    sums += split.to(tl.int64) * 8 * rows
    peaks = tl.load(sums, mask=inside, other=float("-inf"))
    peak = tl.max(peaks, 0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp2((peaks - peak) * scale)
    total = tl.sum(weight * tl.load(sums + 2 * rows, mask=inside, other=0.0), 0)
    mixed = tl.sum(weight * tl.load(sums + 4 * rows, mask=inside, other=0.0), 0)
    positive = tl.sum(tl.load(sums + 6 * rows, mask=inside, other=0.0), 0)
    return peak, total, mixed, positive


@triton.jit
def _joined_pull(
    sums, pulls, peak, scale, rows, splits, column,
    D: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Sum of p times key (C,) of one row over all splits, T at a time."""
    pull = tl.zeros((C,), tl.float32)
    for start in range(0, splits, T):
        split = tl.cast(start, tl.int64) + tl.arange(0, T)
        inside = split < splits
        peaks = tl.load(sums + split * 8 * rows, mask=inside, other=float("-inf"))
        mask = inside[:, None] & (column < D)[None, :]
        part = tl.load(
            pulls + (split * 2 * rows * D)[:, None] + column[None, :], mask=mask, other=0.0
        )
        pull += tl.sum(tl.exp2((peaks - peak) * scale)[:, None] * part, 0)
    return pull


@triton.jit(do_not_specialize=["temperature", "alpha", "ids_step", "rows", "splits"])
def join_kernel(
    keys, key_ids, sums, pulls, losses, counted, gradient, slopes,
    temperature, alpha, ids_step, rows, splits,
    A: tl.constexpr, B: tl.constexpr, D: tl.constexpr,
    C: tl.constexpr, S: tl.constexpr, T: tl.constexpr, HAS_IDS: tl.constexpr,
    TEMPERATURE_IN_MEMORY: tl.constexpr, ALPHA_IN_MEMORY: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """One query of one pair, C columns: the sums of ``sweep_kernel`` -> losses (P, rows), counted
    (P, rows), gradient (P, rows, D), slopes (P, rows) = d loss / d temperature."""
    query = tl.program_id(0)
    pair = tl.program_id(1)
    a = _of(A, pair)
    b = _of(B, pair)
    counts, _ = _counts(query, rows, key_ids, ids_step, a, b, HAS_IDS)
    temperature = _number(temperature, TEMPERATURE_IN_MEMORY)
    alpha = _number(alpha, ALPHA_IN_MEMORY)
    scale = _LOG2_E / temperature
    part = pair.to(tl.int64) * splits
    sums += part * 8 * rows + query
    peak, total, mixed, positive = _joined(sums, scale, rows, splits, S)
    teacher_peak, teacher_total, teacher_mixed, _ = _joined(sums + rows, scale, rows, splits, S)
    # Differences from the positive, which cancel exactly where they are 0.
    excess = mixed / total - positive
    target = alpha * (teacher_mixed / teacher_total - positive)
    out = pair.to(tl.int64) * rows + query
    if tl.program_id(2) == 0:
        loss = tl.log2(total) * _LN_2 + (peak - positive - target) / temperature
        tl.store(losses + out, tl.where(counts, loss, 0.0))
        tl.store(counted + out, counts)
        if GRADIENT:
            slope = (target - excess) / temperature / temperature
            tl.store(slopes + out, tl.where(counts, slope, 0.0))
    if GRADIENT:
        column = tl.program_id(2) * C + tl.arange(0, C)
        pulls += (part * 2 * rows + query) * D
        pull = _joined_pull(sums, pulls, peak, scale, rows, splits, column, D, C, T) / total
        pulls += rows.to(tl.int64) * D
        teacher_pull = _joined_pull(
            sums + rows, pulls, teacher_peak, scale, rows, splits, column, D, C, T
        )
        there = column < tl.where(counts, D, 0)
        key = tl.load(_of(keys, b) + query.to(tl.int64) * D + column, mask=there, other=0.0)
        pull -= alpha * (teacher_pull / teacher_total) + (1.0 - alpha) * key.to(tl.float32)
        pull = tl.where(counts, pull / temperature, 0.0)
        tl.store(gradient + out * D + column, pull, mask=column < D)


class Tile(NamedTuple):
    """Tile of a sweep program: rows (twice its queries), keys per step, warps, pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


def shared_memory(capability: int) -> int:
    """Return the bytes of shared memory available to a program (capability 90 for 9.0)."""
    kilobytes = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
    return 1024 * kilobytes.get(capability, 99)


@lru_cache
def tile_for(
    capability: int, batch: int, width: int, itemsize: int, has_ids: bool, exact: bool
) -> Tile:
    """Return the largest tile that fits a chip's registers and shared memory.

    tools/check_kernels verifies it. Small batches get fewer rows.

    Args:
        capability: compute capability, 90 for 9.0.
        batch: number of queries.
        width: feature width, padded to a power of two.
        itemsize: bytes of a feature in the products.
        has_ids: whether ids are compared, which takes registers.
        exact: exact float32 products, without tensor cores.

    Raises:
        RuntimeError: not even the smallest tile fits.
    """
    if exact or width > 512:
        rows = 16
    elif itemsize == 4:
        rows = 32 if width <= 256 else 16
    elif width <= (256 if capability == 90 else 64):
        rows = 128
    else:
        rows = 64 if width <= 256 else 32
    rows = min(rows, max(16, next_power_of_2(2 * batch)))
    large = rows == 128 or width > 256 or rows * width * itemsize > 16384
    warps = 8 if exact or large else 4
    small = rows <= 32 and width <= 64
    most = 32 if itemsize == 4 or (has_ids and not small) else 64
    if exact and width > 256:
        most = 16
    for keys, stages in ((64, 3), (32, 3), (32, 2), (16, 3), (16, 2)):
        if keys > most:
            continue
        # For 64 rows or more, tensor cores read shared memory, which holds one stage more.
        # TensorFloat-32 needs the keys there in two orders.
        buffers = stages if rows >= 64 else stages - 1
        if itemsize == 4 and not exact:
            buffers = 2
        if (rows + buffers * keys) * width * itemsize <= shared_memory(capability) - 4096:
            return Tile(rows, keys, warps, stages)
    raise RuntimeError(
        f"{width} features of {itemsize} bytes are more than the shared memory of this GPU "
        f"(compute capability {capability / 10}) holds; use half precision or another backend"
    )


@lru_cache
def splits_for(row_tiles: int, key_tiles: int, processors: int, residents: int) -> int:
    """Number of parts the keys are cut into: the fewest that fill the GPU, the last wave included.

    Args:
        row_tiles: tiles of rows, of all pairs.
        key_tiles: tiles of keys and queue of a pair.
        processors: multiprocessors of the GPU.
        residents: programs that a multiprocessor holds at a time.
    """
    splits = max(1, residents * processors // row_tiles)
    while splits < key_tiles:
        programs = splits * row_tiles
        if programs >= 0.85 * processors * cdiv(programs, processors):
            break
        splits += 1
    return max(1, min(splits, key_tiles))


def losses_and_gradients(inputs: ConsistencyInputs) -> ConsistencyResults:
    """Compute the losses of the ordered pairs and their gradients in one sweep over the keys."""
    query, pairs, wanted = inputs.queries[0], inputs.pairs, inputs.want_gradient
    rows, width = query.shape
    shape = (len(pairs), rows)
    results = ConsistencyResults(
        query.new_empty(shape, dtype=torch.float32),
        query.new_empty(shape, dtype=torch.bool),
        query.new_empty((*shape, width) if wanted else 0, dtype=torch.float32),
        query.new_empty(shape if wanted else 0, dtype=torch.float32),
    )
    if results.losses.numel() == 0:
        return results

    dtype = _widest([*inputs.queries, *inputs.teachers, *inputs.keys, *inputs.queues])
    queue_dtype = _widest(inputs.queues) if inputs.queues else dtype
    keys = _rows_of(inputs.keys, dtype)
    queues = _rows_of(inputs.queues, queue_dtype)  # converted only where their dtypes differ
    key_ids, ids_step = _ids_of_modalities(inputs.key_ids, inputs.present)
    key_rows, queue_rows = keys[0].shape[0], queues[0].shape[0] if queues else 0

    capability, processors = chip_of(query.device)
    padded = max(16, next_power_of_2(width))
    has_ids = key_ids is not None
    exact = dtype == torch.float32 and _precision() == "ieee"
    tile = tile_for(capability, rows, padded, dtype.itemsize, has_ids, exact)
    row_tiles = cdiv(2 * rows, tile.rows)
    key_tiles = cdiv(key_rows, tile.keys) + cdiv(queue_rows, tile.keys)
    residents = 8 // tile.warps  # 8 warps of these programs take all registers
    splits = splits_for(row_tiles * len(pairs), key_tiles, processors, residents)
    sums = query.new_empty((len(pairs), splits, 4, 2, rows), dtype=torch.float32)
    pulls = sums.new_empty((len(pairs), splits, 2, rows, width) if wanted else 0)
    lengths, lengths_in_memory = _lengths(inputs.queue_lengths, query)
    flags = {
        "A": tuple(inputs.query_modalities),
        "B": tuple(inputs.key_modalities),
        "D": width,
        "HAS_IDS": has_ids,
        "TEMPERATURE_IN_MEMORY": isinstance(inputs.temperature, Tensor),
        "GRADIENT": wanted,
    }
    with device_of(query):
        launch(
            sweep_kernel, (row_tiles, splits, len(pairs)),
            (_rows_of(inputs.queries, dtype), _rows_of(inputs.teachers, dtype), keys, queues,
             lengths, key_ids, tuple(ids.contiguous() for ids in inputs.queue_ids), sums, pulls,
             inputs.temperature, ids_step, rows, key_rows, queue_rows, splits), **flags,
            DP=padded, M=tile.rows, N=tile.keys,
            HAS_QUEUE=queue_rows > 0, HAS_LENGTHS=len(lengths) > 0,
            LENGTHS_IN_MEMORY=lengths_in_memory, HAS_QUEUE_IDS=len(inputs.queue_ids) > 0,
            PRECISION=_precision(), enable_fp_fusion=True,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        columns = min(padded, 128)
        launch(
            join_kernel, (rows, len(pairs), cdiv(width, columns) if wanted else 1),
            (keys, key_ids, sums, pulls, *results,
             inputs.temperature, inputs.alpha, ids_step, rows, splits), **flags,
            C=columns, S=next_power_of_2(splits), T=16,
            ALPHA_IN_MEMORY=isinstance(inputs.alpha, Tensor), enable_fp_fusion=True,
            num_warps=4, num_stages=2,
        )  # fmt: skip
    return results


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the smallest dtype that holds all of them, float32 at most."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        if tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.float32 if dtype == torch.float64 else dtype


def _rows_of(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple([dense(x, dtype) for x in tensors])


def _ids_of_modalities(key_ids: Tensor | None, present: Tensor | None) -> tuple[Tensor | None, int]:
    """Return ids of the keys per modality (-1 if missing), and the stride between modalities.

    Keys without ids get one each, so that none repeats another."""
    if present is None:
        return None if key_ids is None else key_ids.contiguous(), 0
    if key_ids is None:
        key_ids = torch.arange(len(present), device=present.device)
    return torch.where(present.T, key_ids, -1).contiguous(), len(present)


def _lengths(
    lengths: Sequence[int | Tensor], like: Tensor
) -> tuple[tuple[int | Tensor, ...], bool]:
    """Return the lengths for the kernel, and True if they are tensors.

    An int n is passed as 2 n + 3: the compiler would specialise on 1 and on multiples of 16.
    """
    if all(isinstance(n, int) for n in lengths):
        return tuple(2 * n + 3 for n in lengths), False
    full = [torch.full((), n, device=like.device) if isinstance(n, int) else n for n in lengths]
    return tuple(full), True


def _precision() -> str:
    """Return the precision of float32 products: "ieee", or "tf32" if torch's settings allow it.

    ``get_float32_matmul_precision`` would raise if the newer of the two settings was used.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
