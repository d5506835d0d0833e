"""Options of the networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mics_fast.options.fields import option

ModelSize = Literal["vit_nano", "vit_micro", "vit_tiny", "vit_small", "vit_base"]


@dataclass
class ModelConfig:
    """The encoder; decoder and discriminator scale with it (table in ``models/sizes.py``)."""

    size: ModelSize = option(
        "vit_base",
        "of the encoder: vit_nano and vit_micro (64 px / 8), vit_tiny, vit_small (224 / "
        "16), vit_base (384 / 16)",
        source="paper",
    )
    pool: Literal["cls", "mean"] = option(
        "cls", "input of a head: the class token, or the mean of the patch tokens"
    )
    projection: int = option(
        256, "width of the contrastive feature", source="ALBEF", above=0, most=65536
    )
    fusion_depth: int = option(4, "blocks of the fusion encoder", above=0, most=64)
    init: str = option(
        "",
        "initial weights of the encoders, from the file of a vision transformer with timm's names: "
        "for pre-training, or for fine-tuning without it (data.mean and data.std should be those "
        "of its training)",
    )
    init_prefix: str = option(
        "",
        "prefix of the network if that file holds several, as in teacher.backbone (DINO) or "
        "module.base_encoder (MoCo v3); default: the only one",
    )
    activation_checkpointing: bool = option(
        False,
        "recomputes each block's activations in the backward pass instead of keeping them: "
        "less memory, a third more arithmetic, the same result",
    )
