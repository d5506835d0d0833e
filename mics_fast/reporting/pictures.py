"""Pictures for the report: thumbnails, saliency overlays; and features."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from mics_fast.data.images import decode
from mics_fast.data.loaders import PairBatch
from mics_fast.data.manifest import Manifest
from mics_fast.engine.checkpoint import load_checkpoint, weights_of
from mics_fast.evaluation.opinions import Opinions, collect_opinions
from mics_fast.inference.explanation import Explanation
from mics_fast.models.classifier import Classifier
from mics_fast.models.pretraining import PretrainModel
from mics_fast.models.sizes import size_of
from mics_fast.training.run import Run, identity, pretraining_of

SIDE = 256


def thumbnail(file: Path) -> str:
    """Encode an image file, at most 256 pixels wide or high, as a data URI."""
    image = Image.fromarray(decode(file))
    image.thumbnail((SIDE, SIDE))
    return _uri(image, "JPEG")


def picture(image: Tensor, low: float, high: float) -> str:
    """Encode (3, H, W) as a data URI; ``low`` becomes black and ``high`` white."""
    levels = ((image - low) / max(high - low, 1e-6)).clamp(0, 1)
    return _uri(Image.fromarray((255 * levels).byte().permute(1, 2, 0).cpu().numpy()), "PNG")


def overlay(explanation: Explanation) -> str:
    """Encode an explanation picture as a data URI."""
    return _uri(Image.fromarray(explanation.picture()), "PNG")


def _uri(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=88)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{encoded}"


def load_pretrained(run: Run, manifest: Manifest) -> PretrainModel | None:
    """Load the pre-trained model that a run's fine-tuning started from; None without one.

    Raises:
        InputError: the checkpoint is missing.
    """
    config = run.config
    checkpoint = pretraining_of(run)
    if checkpoint is None:
        return None
    state = load_checkpoint(
        checkpoint, identity(config, manifest.modalities, manifest.classes, "pretrain")
    )
    model = PretrainModel(
        size_of(config.model),
        manifest.modalities,
        pool=config.model.pool,
        projection=config.model.projection,
        temperature=config.pretrain.temperature,
    )
    model.load_state_dict(weights_of(state, "model"))
    return model.eval()


def collect_features(model: Classifier, batches: Iterable[PairBatch]) -> tuple[Tensor, Opinions]:
    """Collect the input of the last head, (N, width), and the opinions in one pass."""
    features: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features.append(inputs[0].detach().cpu())

    hook = model.heads[model.views[-1]].register_forward_pre_hook(keep)
    try:
        opinions = collect_opinions(model, batches)
    finally:
        hook.remove()
    return torch.cat(features), opinions


def principal_components(features: Tensor) -> tuple[Tensor, list[float]]:
    """Project on the two directions of largest variance, (N, 2); also return their shares."""
    centred = features.double() - features.double().mean(0)
    left, strength, _ = torch.linalg.svd(centred, full_matrices=False)
    share = strength.square() / strength.square().sum().clamp(min=1e-12)
    return (left * strength)[:, :2].float(), share[:2].tolist()
