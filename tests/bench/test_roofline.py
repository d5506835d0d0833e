"""The closed forms of bytes and FLOPs, against counts that are not derived from them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import consistency, evidential, roofline, shift
from bench.roofline import Peaks, Work, floor_seconds
from mics_kernels import class_moments

CPU = torch.device("cpu")


def size(*tensors: torch.Tensor) -> int:
    """Bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def counted(call: object) -> int:
    """FLOPs of matrix products as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        call()  # type: ignore[operator]
    return counter.get_total_flops()


@pytest.fixture
def small_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consistency, "QUEUE", 512)


def test_the_consistency_loss_takes_the_products_of_attention_that_torch_counts(
    small_queue: None,
) -> None:
    step = consistency.rivals(16, CPU, False).found["attention (SDPA)"].step
    assert roofline.consistency(16, 256, 512, 4).flops == counted(step)


def test_published_code_takes_three_of_the_four_products_because_it_keeps_the_logits(
    small_queue: None,
) -> None:
    step = consistency.rivals(16, CPU, False).found["ALBEF eager"].step
    assert 3 * roofline.consistency(16, 256, 512, 4).flops == 4 * counted(step)


def test_the_consistency_loss_moves_its_tensors_once(small_queue: None) -> None:
    features, teachers, queues = consistency.inputs(16, CPU, 512)
    gradients = features
    moved = size(*features, *teachers, *queues, *gradients)
    assert roofline.consistency(16, 256, 512, 4).bytes == moved


def test_hard_targets_take_the_products_of_a_linear_cross_entropy(small_queue: None) -> None:
    step = consistency.hard_rivals(16, CPU, False).found["cross_entropy eager"].step
    assert roofline.contrastive(16, 256, 512, 4).flops == counted(step)


def test_an_evidential_operator_moves_its_tensors_once() -> None:
    values, labels = evidential.inputs("evidential_fusion_loss", (64, 3, 8), CPU, False)
    fused = values[:, 0]
    moved = size(values, labels, values, fused)
    assert roofline.evidential(64, 3, 8, fuse=True, judge=True).bytes == moved
    moved = size(values, labels, values)
    assert roofline.evidential(64, 3, 8, fuse=False, judge=True).bytes == moved
    moved = size(values, values, fused)
    assert roofline.evidential(64, 3, 8, fuse=True, judge=False).bytes == moved


def test_shift_and_moments_move_their_tensors_once() -> None:
    x, labels = shift.inputs(64, torch.bfloat16, CPU, False)
    table = torch.empty(shift.CLASSES, shift.DIM)
    assert roofline.shift(64, shift.DIM, shift.CLASSES, 2).bytes == size(x, labels, table, x)
    x = x.float()
    moved = size(x, labels, *class_moments(x, labels, shift.CLASSES, backend="reference"))
    assert roofline.moments(64, shift.DIM, shift.CLASSES, 4).bytes == moved


def test_the_floor_is_the_longer_of_moving_and_computing() -> None:
    peaks = Peaks(bytes=100.0, matrix_flops=1000.0, vector_flops=10.0, source="")
    assert floor_seconds(Work(200, 1000, matrix=True), peaks) == 2.0
    assert floor_seconds(Work(200, 3000, matrix=True), peaks) == 3.0
    assert floor_seconds(Work(200, 1000), peaks) == 100.0
