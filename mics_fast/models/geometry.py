"""Geometry of a published vision transformer, read from its configuration and its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mics_fast.common.errors import InputError
from mics_fast.models.vit import Parts, VisionTransformer

# Heads for published widths whose heads are not 64 wide: ViT-H, ViT-g, SO400M, ViT-G.
_HEADS = {1280: 16, 1408: 16, 1152: 16, 1664: 16}
_HEAD_WIDTH = 64
_BLOCK = re.compile(r"blocks\.(\d+)\.")
# Parts before or inside the blocks. Parts behind the tokens (classifier heads, decoders, a norm
# after the pooling) are ignored.
_INSIDE = re.compile(
    r"(blocks\.|patch_embed\.|norm_pre\.|reg_token|dist_token|storage_tokens|rope|rel_pos)"
)


@dataclass(frozen=True)
class Geometry:
    """Shape of a vision transformer, without weights.

    Args:
        image: side of the square image that its positions belong to, in pixels.
        patch: side of a square patch, in pixels.
        width, depth, heads: of the transformer.
        parts: additions to a plain vision transformer.
        mean, std: per channel, of images in [0, 1]; None if not given.
    """

    image: int
    patch: int
    width: int
    depth: int
    heads: int
    parts: Parts
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None


def geometry_of(
    source: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> Geometry:
    """Read the geometry from the tensors, and the rest from the configuration.

    Args:
        source: name for error messages.
        tensors: of one vision transformer, with timm's names.
        config: a timm ``config.json``: ``architecture``, ``model_args``, ``pretrained_cfg``.

    Raises:
        InputError: not a vision transformer, or one with an unsupported part.
    """
    config = config or {}
    stated = _mapping(config.get("pretrained_cfg", config))
    architecture = str(config.get("architecture", stated.get("architecture", "")))
    width, channels, patch, across = _shape(source, tensors, "patch_embed.proj.weight", 4)
    if channels != 3 or patch != across:
        raise InputError(
            f"{source}: patch_embed.proj.weight is for {channels} channels and patches of "
            f"{patch} x {across}, wanted 3 channels and square patches"
        )
    depth = len({match[1] for match in map(_BLOCK.match, tensors) if match})
    heads = stated_heads(config) or _HEADS.get(width, max(1, width // _HEAD_WIDTH))
    if not depth or width % heads:
        raise InputError(f"{source} has {depth} blocks of width {width} and {heads} heads")
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    grid, prefix = _positions(source, _shape(source, tensors, "pos_embed", 3)[1], registers)
    pre_norm = "norm_pre.weight" in tensors
    layer_scale = "blocks.0.ls1.gamma" in tensors
    parts = Parts(
        hidden=_shape(source, tensors, "blocks.0.mlp.fc1.weight", 2)[0],
        registers=registers,
        prefix_positions=prefix > 0 or not registers,
        layer_scale=layer_scale,
        pre_norm=pre_norm,
        patch_bias="patch_embed.proj.bias" in tensors,
        quick_gelu="quickgelu" in architecture,
        eps=1e-5 if pre_norm else 1e-6,
        antialias=not (layer_scale and not registers),
    )
    geometry = Geometry(
        grid * patch, patch, width, depth, heads, parts,
        _triple(stated.get("mean")), _triple(stated.get("std")),
    )  # fmt: skip
    _refuse_unknown_parts(source, tensors, geometry)
    return geometry


def _shape(source: str, tensors: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    """Return the shape of a tensor that every supported network has.

    Raises:
        InputError: it is missing, or has another number of dimensions.
    """
    if name not in tensors:
        raise InputError(f"{source} has no {name}, wanted a vision transformer in timm's naming")
    shape = tuple(tensors[name].shape)
    if len(shape) != ndim:
        raise InputError(f"{source}: {name} is {shape}, wanted {ndim} dimensions")
    return shape


def _positions(source: str, count: int, registers: int) -> tuple[int, int]:
    """Return the side of the square grid of positions, and the number of tokens before it.

    Raises:
        InputError: no square grid remains.
    """
    for prefix in (1 + registers, 0, 1):
        side = round(max(0, count - prefix) ** 0.5)
        if side and side**2 == count - prefix:
            return side, prefix
    raise InputError(
        f"{source}: pos_embed has {count} positions, wanted those of a square grid of patches, "
        f"with or without {1 + registers} of the class and register tokens"
    )


def stated_heads(config: Mapping[str, Any]) -> int:
    """Return the number of heads that a ``config.json`` states; 0: none."""
    heads = _mapping(config.get("model_args")).get("num_heads")
    return heads if isinstance(heads, int) and heads > 0 else 0


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _triple(values: Any) -> tuple[float, float, float] | None:
    if not isinstance(values, list | tuple) or len(values) != 3:
        return None
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        return None
    first, second, third = (float(value) for value in values)
    return first, second, third


def _refuse_unknown_parts(source: str, tensors: Mapping[str, Tensor], geometry: Geometry) -> None:
    """Refuse parts that the encoder would ignore and so compute something else.

    Raises:
        InputError: names the first unknown part of each kind.
    """
    own = new_encoder(geometry, device="meta").state_dict()
    unknown = sorted(
        {_BLOCK.sub("blocks.N.", name) for name in tensors
         if name not in own and _INSIDE.match(name)}
    )  # fmt: skip
    if unknown:
        raise InputError(
            f"{source} has parts that are not supported: {', '.join(unknown[:4])}; supported are "
            "plain ViT, MAE, DINO, DINOv2 with and without registers, and CLIP's image tower"
        )


def as_numbers(geometry: Geometry) -> dict[str, float]:
    """Return a geometry as a configuration stores it: names and numbers, without mean and std."""
    fields = asdict(geometry)
    parts = fields.pop("parts")
    del fields["mean"], fields["std"]
    return {
        name: value if name == "eps" else int(value) for name, value in (fields | parts).items()
    }


def from_numbers(numbers: Mapping[str, float]) -> Geometry:
    """Return the geometry that ``as_numbers`` stored.

    Raises:
        InputError: a number is missing, unknown, or none that a network can have.
    """
    plain = as_numbers(Geometry(16, 16, 64, 1, 1, Parts()))
    differing = sorted(plain.keys() ^ numbers.keys())
    if differing:
        raise InputError(
            f"option model.geometry lacks or does not know {', '.join(differing)}, wanted what a "
            "run wrote"
        )
    whole = {name: int(value) for name, value in numbers.items() if name != "eps"}
    sizes = [whole.pop(name) for name in ("image", "patch", "width", "depth", "heads")]
    image, patch, width, depth, heads = sizes
    if min(sizes) < 1 or image % patch or width % heads or width % 4 or depth > 256:
        raise InputError(f"option model.geometry {dict(numbers)} is of no vision transformer")
    parts = Parts(
        hidden=whole["hidden"],
        registers=whole["registers"],
        prefix_positions=bool(whole["prefix_positions"]),
        layer_scale=bool(whole["layer_scale"]),
        pre_norm=bool(whole["pre_norm"]),
        patch_bias=bool(whole["patch_bias"]),
        quick_gelu=bool(whole["quick_gelu"]),
        eps=float(numbers["eps"]),
        antialias=bool(whole["antialias"]),
    )
    return Geometry(image, patch, width, depth, heads, parts)


def new_encoder(geometry: Geometry, *, device: str = "cpu") -> VisionTransformer:
    """Make an encoder of a geometry, with initial weights."""
    with torch.device(device):
        return VisionTransformer(
            geometry.image, geometry.patch, geometry.width, geometry.depth, geometry.heads,
            geometry.parts,
        )  # fmt: skip
