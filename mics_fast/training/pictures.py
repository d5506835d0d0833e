"""Pictures of a stage in training: reconstructions, predictions, the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from mics_fast.common.files import printable
from mics_fast.data.loaders import PairBatch
from mics_fast.evaluation.opinions import Predictions
from mics_fast.models.masked_autoencoder import patch_targets, random_mask, unpatchify
from mics_fast.models.pretraining import PretrainModel, paste_patches
from mics_fast.models.vit import patchify

SIDE = 128  # pixels of an image in a picture
LINE = 16  # pixels of a line of text
CELL = 40  # pixels of a cell of the confusion matrix
RIGHT, WRONG = (0, 114, 178), (213, 94, 0)  # told apart without red and green


@dataclass
class Pictures:
    """Pictures of one modality of one sample, each (3, H, W) on a common scale.

    Args:
        image: the encoder's input.
        masked: masked patches in grey.
        predicted: masked patches replaced by the decoder's predictions.
    """

    image: Tensor
    masked: Tensor
    predicted: Tensor


@torch.no_grad()
def reconstruct(
    model: PretrainModel, images: Tensor, sample_id: Tensor, mask_ratio: float, stream: int
) -> list[Pictures]:
    """Mask patches and reconstruct them, as in training.

    The decoder predicts patches of mean 0 and variance 1; they are shown with the mean and
    variance of the true patch.

    Args:
        model: of the first stage.
        images: (B, 3, H, H) of one modality.
        sample_id: (B,) int64, determines the masks.
        mask_ratio: share of masked patches.
        stream: index of the modality.
    """
    patches = patchify(images, model.patch_size)
    visible, hidden = random_mask((0, 0), sample_id, 0, patches.shape[1], mask_ratio, stream)
    guessed = model.decoder(model.encoder(images, visible), visible, hidden).to(images.dtype)
    pasted = paste_patches(patch_targets(images, model.patch_size), hidden, guessed)
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=0)
    predicted = pasted * (variance + 1e-6).sqrt() + mean
    grey = torch.full_like(guessed, float(images.mean()))
    masked = paste_patches(patches, hidden, grey)
    return [
        Pictures(*three)
        for three in zip(
            images,
            unpatchify(masked, model.patch_size),
            unpatchify(predicted, model.patch_size),
            strict=True,
        )
    ]


def reconstruction_strip(model: PretrainModel, batch: PairBatch, mask_ratio: float) -> Tensor:
    """Draw image, visible patches and reconstruction of every image of a batch.

    Returns:
        (3, H, W) uint8: one row per sample, three columns per modality.
    """
    columns: list[Tensor] = []
    with torch.compiler.set_stance("force_eager"):  # not compiled again for this batch's size
        for stream, name in enumerate(model.modalities):
            shown = reconstruct(model, batch.views[name], batch.sample_id, mask_ratio, stream)
            three = [
                torch.stack([levels(own.image, own.image), levels(own.masked, own.image),
                             levels(own.predicted, own.image)])
                for own in shown
            ]  # fmt: skip
            present = batch.present[:, stream].cpu()[:, None, None, None, None]
            columns.append(torch.stack(three) * present)
    return tiles(torch.cat(columns, 1))


def prediction_strip(batch: PairBatch, predictions: Predictions, classes: Sequence[str]) -> Tensor:
    """Draw the images of a batch above the answer and the truth; a bar tells right from wrong.

    Args:
        batch: Of N rows, with labels.
        predictions: For these rows.
        classes: Names.

    Returns:
        (3, H, W) uint8: one column per row of the batch, one line of images per modality.
    """
    shown = [
        torch.stack([levels(image, image) for image in images])
        * batch.present[:, column].cpu()[:, None, None, None]
        for column, images in enumerate(batch.views.values())
    ]
    images = tiles(torch.stack(shown))
    text = Image.new("RGB", (images.shape[2], 2 * LINE + 4), "white")
    draw, font = ImageDraw.Draw(text), ImageFont.load_default()
    answers = predictions.probability.argmax(1).tolist()
    for place, (answer, truth) in enumerate(zip(answers, predictions.label.tolist(), strict=True)):
        left = place * SIDE
        draw.rectangle((left, 0, left + SIDE - 2, 3), fill=RIGHT if answer == truth else WRONG)
        draw.text((left + 2, 5), shortened(classes[answer], font), fill="black", font=font)
        if answer != truth:
            true = shortened(f"not {classes[truth]}", font)
            draw.text((left + 2, 5 + LINE), true, fill=WRONG, font=font)
    return torch.cat([images, as_tensor(text)], 1)


def confusion_picture(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> Tensor:
    """Draw a confusion matrix: rows are the truth, columns the answers, both in class order.

    Returns:
        (3, H, W) uint8.
    """
    size, names = len(classes), 130
    image = Image.new("RGB", (names + size * CELL, LINE + size * CELL), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default()
    draw.text((names, 1), "answers, in the same order", fill="black", font=font)
    for row, own in enumerate(counts):
        top, total = LINE + row * CELL, max(1, sum(own))
        draw.text((2, top + CELL // 3), shortened(classes[row], font), fill="black", font=font)
        for column, count in enumerate(own):
            left, share = names + column * CELL, count / total
            blue = tuple(round(255 + share * (own - 255)) for own in RIGHT)
            box = (left, top, left + CELL - 2, top + CELL - 2)
            draw.rectangle(box, fill=blue, outline="black" if row == column else None)
            ink = "white" if share > 0.5 else "black"
            draw.text((left + 6, top + CELL // 3), str(count), fill=ink, font=font)
    return as_tensor(image)


def levels(image: Tensor, scale: Tensor) -> Tensor:
    """Bring (3, H, W) to ``SIDE`` pixels and to 0..1, where ``scale`` spans that range."""
    low, high = scale.amin(), scale.amax()
    own = ((image - low) / (high - low).clamp(min=1e-6)).clamp(0, 1).float()
    return interpolate(own[None], (SIDE, SIDE))[0].cpu()


def tiles(images: Tensor) -> Tensor:
    """Lay out (rows, columns, 3, side, side) in 0..1 as one picture, (3, H, W) uint8."""
    return (255 * images).byte().permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


def as_tensor(image: Image.Image) -> Tensor:
    """Turn an RGB image into (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def shortened(name: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """Cut a name to the width of an image."""
    name = printable(name)
    if font.getlength(name) <= SIDE - 4:
        return name
    while name and font.getlength(f"{name}...") > SIDE - 4:
        name = name[:-1]
    return f"{name}..."
