"""The copies on a device that the tests of all implementations work on."""

from __future__ import annotations

import torch

from tests.kernels.implementations import on_device


def test_a_copy_is_as_misaligned_as_what_it_copies() -> None:
    storage = torch.arange(65, dtype=torch.float32)
    for offset in (1, 2, 4, 16):
        x = storage[offset : offset + 8]
        copy = on_device(x, "cpu")
        assert copy.data_ptr() != x.data_ptr() and torch.equal(copy, x)
        assert copy.data_ptr() % 64 == x.data_ptr() % 64


def test_a_copy_has_the_strides_of_what_it_copies() -> None:
    x = torch.arange(24.0).reshape(4, 6)
    for view in (x.T, x[:, ::2], x[1:, :3], x[0].expand(3, 6), x[:0]):
        copy = on_device(view, "cpu")
        assert torch.equal(copy, view) and copy.shape == view.shape
    assert on_device(x[:, ::2], "cpu").stride() == (6, 2)
