"""The option ``precision`` on a device: autocast, loss scaling, TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.amp import GradScaler

from mics_fast.options import PrecisionName


@dataclass(frozen=True)
class Precision:
    """How numbers are held and multiplied.

    Args:
        autocast: dtype of the encoders' arithmetic; None: float32.
        tf32: whether a GPU may round the factors of float32 products to ten bits of mantissa.
    """

    autocast: torch.dtype | None
    tf32: bool

    @property
    def name(self) -> str:
        """Of the encoders' arithmetic: "fp32", "bf16" or "fp16"."""
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(
            self.autocast or torch.float32, "fp32"
        )

    def scaler(self, device: torch.device) -> GradScaler | None:
        """Keeps gradients within float16's range; None where nothing is computed in it."""
        return GradScaler(device.type) if self.autocast is torch.float16 else None

    @contextmanager
    def products(self) -> Iterator[None]:
        """Set how float32 products are taken, and put back what was; nothing here convolves."""
        # Not by the newer torch.backends.cuda.matmul.fp32_precision: torch.compile reads this one,
        # which is an error after the other.
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def pick_precision(name: PrecisionName, device: torch.device) -> Precision:
    """The precision that an option names, on a device.

    What bf16 and fp16 leave in float32 (the discriminator, the heads) may use TF32: its factors
    keep more bits than theirs.
    """
    if name == "auto":
        name = "fp32"
        if device.type == "cuda":
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)
    return Precision(autocast, tf32=name != "fp32")
