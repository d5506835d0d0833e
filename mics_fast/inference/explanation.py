"""Explanation pictures: which patches of which image an answer depends on.

The measure is the gradient of the answer (Simonyan et al., ICLR 2014 workshop), which follows the
weights of the network; a test repeats the sanity check of Adebayo et al. (NeurIPS 2018) with
randomised weights. It says what would change the answer, not whether the answer is right.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, softplus

from mics_fast.common.errors import InputError
from mics_fast.common.files import make_folder
from mics_fast.data.images import decode, save
from mics_fast.data.loaders import PairBatch
from mics_fast.data.manifest import Row
from mics_fast.inference.loaded_classifier import LoadedClassifier
from mics_fast.inference.run_classifier import RunClassifier
from mics_fast.models.classifier import Classifier
from mics_fast.models.sizes import size_of
from mics_kernels import fuse_evidence, opinion

ORANGE = np.array([230, 159, 0], dtype=np.float32)
BLACK = 24  # brightest value of a black pixel, of 255: the black of JPEG frames is noisy
SIDE = 256  # least side of a picture, pixels


@dataclass(frozen=True)
class Explanation:
    """Which patches of one image an answer depends on.

    Args:
        image: As the encoder sees it, (3, H, H).
        weight: Of each patch, (rows, columns), at least 0; 0 where the image is black.
    """

    image: Tensor
    weight: Tensor

    def picture(self) -> np.ndarray:
        """Draw the image in grey, tinted orange by weight, (side, side, 3) uint8.

        Patches up to the median weight of those that count are not tinted: the gradient of a
        network is nowhere exactly 0.
        """
        low, high = self.image.min(), self.image.max()
        grey = 255 * ((self.image - low) / (high - low).clamp(min=1e-6)).mean(0)
        counting = self.weight[self.weight > 0]
        median = counting.median() if len(counting) else self.weight.new_zeros(())
        share = (self.weight - median).clamp(min=0)
        share = share / share.max().clamp(min=1e-12)
        scale = -(-SIDE // grey.shape[0])
        side = [grey.shape[0] * scale] * 2
        grey, share = (interpolate(own[None, None], side)[0, 0] for own in (grey, share))
        tint = share.cpu().numpy()[..., None]
        mixed = (1 - tint) * grey.cpu().numpy()[..., None] + tint * ORANGE
        return mixed.clip(0, 255).astype(np.uint8)


def explain(
    classifier: RunClassifier, rows: Sequence[Row]
) -> Iterator[tuple[Row, dict[str, Explanation]]]:
    """Explain the answers about rows; rows with an unreadable image are skipped.

    Yields:
        The row, and modality -> explanation of each of its images.
    """
    loader = classifier.loader(rows, replace(classifier.data, on_bad_file="skip"))
    by_index = {row.index: row for row in rows}
    size, patch = classifier.image_size, size_of(classifier.run.config.model).patch
    for batch in loader:
        weights = saliency(classifier.model, batch, patch)
        for place, index in enumerate(batch.sample_id.tolist()):
            row = by_index[index]
            found: dict[str, Explanation] = {}
            for column, (name, weight) in enumerate(weights.items()):
                file = row.files[name]
                if file is not None and batch.present[place, column]:
                    bright = ~dark_patches(decode(file), size, weight.shape[-1])
                    own = weight[place].cpu() * bright
                    found[name] = Explanation(batch.views[name][place].float().cpu(), own)
            yield row, found


def saliency(model: Classifier, batch: PairBatch, patch: int) -> dict[str, Tensor]:
    """Measure how much each patch of each modality affects the answer.

    The measure is the absolute gradient of the log of the largest fused probability with respect
    to the normalised pixels, summed over channels and averaged over each patch.

    Returns:
        modality -> (B, rows, columns), 0 if the image is missing.
    """
    images = {name: view.clone().requires_grad_() for name, view in batch.views.items()}
    output = model(images, batch.present)
    fused = opinion(fuse_evidence(softplus(output.logits), present=output.present))
    names = list(images)
    answer = fused.probability.amax(1).log().sum()
    gradients = torch.autograd.grad(answer, [images[name] for name in names])
    return {
        name: avg_pool2d(gradient.abs().sum(1, keepdim=True), patch)[:, 0]
        for name, gradient in zip(names, gradients, strict=True)
    }


def dark_patches(image: np.ndarray, size: int, count: int) -> Tensor:
    """Mark the patches more than half of whose pixels are black, as the borders of a frame are.

    Args:
        image: (H, W, 3) uint8.
        size: Side of the image that the encoder sees, pixels.
        count: Patches along a side.

    Returns:
        (count, count) bool.
    """
    seen = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.NEAREST))
    black = torch.from_numpy(seen.max(2) <= BLACK).float()
    return avg_pool2d(black[None, None], size // count)[0, 0] > 0.5


def check_explainable(classifier: LoadedClassifier) -> RunClassifier:
    """Refuse a classifier without gradients.

    Raises:
        InputError: it is exported, or an ensemble.
    """
    if not isinstance(classifier, RunClassifier):
        raise InputError("--explain needs the gradient of one network, wanted one run folder")
    return classifier


def write_explanations(classifier: RunClassifier, rows: Sequence[Row], folder: Path) -> int:
    """Write one picture per image into a folder; return their number.

    Raises:
        InputError: the folder cannot be made.
    """
    make_folder(folder)
    count = 0
    for row, found in explain(classifier, rows):
        for name, own in found.items():
            save(own.picture(), folder / f"{row.index:05d}-{file_name(row.id)}-{name}.png")
            count += 1
    return count


def file_name(text: str) -> str:
    """Reduce an id to characters that every file system takes, at most 80."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text)[-80:]
