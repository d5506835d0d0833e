"""Options of the networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mics_fast.options.fields import option

ModelSize = Literal["vit_nano", "vit_micro", "vit_tiny", "vit_small", "vit_base"]
PooledFusionName = Literal["mlp", "bilinear"]


@dataclass
class ModelConfig:
    """The encoder; decoder and discriminator scale with it (``models/sizes.py``)."""

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
    image: int | None = option(
        None,
        "side of the views in pixels, a multiple of the patch; null: the encoder's own",
        above=0, most=8192,
    )  # fmt: skip
    pooled_fusion: PooledFusionName = option(
        "mlp",
        'fusion of the pooled features of frozen encoders (finetune.encoder): "mlp" or "bilinear"',
    )
    init: str = option(
        "",
        "initial weights of the encoders, for pre-training or for fine-tuning without it: a file "
        "of a vision transformer with timm's names, a folder with config.json and "
        "model.safetensors, or hf-hub:OWNER/NAME[@REVISION]. They determine the encoder, so that "
        "model.size is not read, and their config.json the defaults of data.mean and data.std",
    )
    geometry: dict[str, float] = option(
        help="of the encoder that model.init names; a run writes it into its configuration, so "
        "that it can be read without the weights",
        factory=dict, least=0, most=65536,
    )  # fmt: skip
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
