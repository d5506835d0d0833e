"""The option ``precision`` on a device: autocast, loss scaling, TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from time import perf_counter

import torch
from torch.amp import GradScaler

from mics_fast.options import PrecisionName


@dataclass(frozen=True)
class Precision:
    """Number formats of training.

    Args:
        autocast: dtype of the encoders' arithmetic; None: float32.
        tf32: True if a GPU may round the factors of float32 products to TF32 (10-bit mantissa).
    """

    autocast: torch.dtype | None
    tf32: bool

    @property
    def name(self) -> str:
        """Name of the encoders' format: "fp32", "bf16" or "fp16"."""
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(
            self.autocast or torch.float32, "fp32"
        )

    def scaler(self, device: torch.device) -> GradScaler | None:
        """Make a loss scaler for float16; None for other formats."""
        return GradScaler(device.type) if self.autocast is torch.float16 else None

    @contextmanager
    def products(self) -> Iterator[None]:
        """Set the format of float32 matrix products, and restore it afterwards."""
        # Not torch.backends.cuda.matmul.fp32_precision, the newer setting: torch.compile reads the
        # old one, which is an error once the new one has been set.
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def pick_precision(name: PrecisionName, device: torch.device) -> Precision:
    """Choose the precision for an option and a device.

    With bf16 and fp16, the parts that stay in float32 (discriminator, heads) may use TF32, which
    has more mantissa bits than either.
    """
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":
        name = "bf16" if bf16_speedup() > 1.4 else "fp32"
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)
    return Precision(autocast, tf32=name != "fp32")


@cache
def bf16_speedup() -> float:
    """Time matrix products on the CPU in float32 and in bfloat16, a fifth of a second at most.

    About 2 with AVX512-BF16, more with AMX; below 1 where bfloat16 is emulated.
    """
    side = 256  # smaller products mostly measure the call
    single = torch.ones(side, side)
    half = single.bfloat16()
    seconds = [float("inf")] * 2
    for _ in range(8):  # the fastest of each, in turns: other processes do not decide
        for i, factor in enumerate((single, half)):
            start = perf_counter()
            factor @ factor
            seconds[i] = min(seconds[i], perf_counter() - start)
    return seconds[0] / seconds[1]
