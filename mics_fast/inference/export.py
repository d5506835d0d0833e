"""Export: a run's classifier as files that need none of this code.

model.pt2       ``torch.export`` program
model.onnx      the same for ONNX Runtime, where the [export] extra is installed
model.json      names of inputs and outputs, preprocessing, how exactly they agree
MODEL_CARD.md   data, metrics with intervals, limits
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from mics_fast.common.errors import RunFailed
from mics_fast.common.files import renamed
from mics_fast.data.views import IMAGENET_MEAN, IMAGENET_STD
from mics_fast.inference.exported_model import ONNX, OUTPUTS, PROGRAM, open_session
from mics_fast.inference.run_model import Trained
from mics_fast.models.classifier import Classifier
from mics_fast.models.sizes import SIZES
from mics_kernels import conflict, fuse_evidence, opinion

# Outputs lie in [0, 1] except evidence, which is compared relative to evidence + 1.
TOLERANCE = 1e-4


class Answering(nn.Module):
    """A classifier from normalised images to opinions, in plain tensor operations.

    Args:
        model: the classifier, in evaluation mode.
    """

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, present: Tensor, *images: Tensor) -> tuple[Tensor, ...]:
        """What ``OUTPUTS`` names.

        Args:
            present: (B, M) bool.
            images: for each modality (B, 3, H, H) float32.

        Returns:
            Fused belief (B, C), uncertainty (B,), probability (B, C); conflict of the modalities
            (B,); evidence (B, V, C) and presence (B, V) of every view.
        """
        views = dict(zip(self.model.modalities, images, strict=True))
        output = self.model(views, present)
        evidence = softplus(output.logits)
        fused = fuse_evidence(evidence, present=output.present, backend="reference")
        said = opinion(fused)
        disagreement = conflict(evidence[:, : len(images)], present=present)
        return (*said, disagreement, evidence, output.present)


def export_model(trained: Trained, out: Path) -> dict[str, float]:
    """Write the program and, where ONNX is installed, the ONNX model.

    Returns:
        File name -> largest difference from the original on random inputs.

    Raises:
        RunFailed: a difference is above the tolerance.
    """
    module = Answering(trained.model.cpu()).eval()
    size = SIZES[trained.run.config.model.size].image
    inputs = random_inputs(trained.modalities, size, rows=3, seed=0)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(
        module,
        inputs,
        dynamic_shapes={"present": {0: batch}, "images": ({0: batch},) * (len(inputs) - 1)},
    )
    with renamed(out / PROGRAM) as partial:
        torch.export.save(program, partial)
    agreement = {PROGRAM: largest_difference(module, program.module(), trained.modalities, size)}
    if all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        write_onnx(program, trained.modalities, out / ONNX)
        session = open_session(out / ONNX)

        def run(*given: Tensor) -> list[Tensor]:
            named = zip(("present", *trained.modalities), given, strict=True)
            outputs = session.run(OUTPUTS, {name: tensor.numpy() for name, tensor in named})
            return [torch.from_numpy(output) for output in outputs]

        agreement[ONNX] = largest_difference(module, run, trained.modalities, size)
    else:
        print("no ONNX model: onnx is not installed, wanted: pip install 'mics-fast[export]'")
    for name, largest in agreement.items():
        if not largest <= TOLERANCE:
            raise RunFailed(
                f"{out / name} differs from the original by {largest:.1e}, wanted at most "
                f"{TOLERANCE:.0e}"
            )
    return agreement


def write_onnx(
    program: torch.export.ExportedProgram, modalities: Sequence[str], file: Path
) -> None:
    """Translate a program to one ONNX file, under a temporary name first."""
    # It would warn that operators of torchvision, which nothing here uses, are not there.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        translated = torch.onnx.export(
            program,
            input_names=["present", *modalities],
            output_names=list(OUTPUTS),
            dynamo=True,
            verbose=False,
        )
    assert translated is not None
    with renamed(file) as partial:
        translated.save(partial, external_data=False)


def random_inputs(
    modalities: Sequence[str], size: int, *, rows: int, seed: int
) -> tuple[Tensor, ...]:
    """Presence (rows, M) and noise images (rows, 3, size, size); some modalities are missing."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(rows, len(modalities), generator=generator) < 0.7
    images = torch.randn(len(modalities), rows, 3, size, size, generator=generator)
    return (present, *images.unbind(0))


@torch.no_grad()
def largest_difference(
    original: nn.Module,
    exported: Callable[..., Sequence[Tensor]],
    modalities: Sequence[str],
    size: int,
) -> float:
    """Over all outputs, on random inputs in batches of other sizes than the exported one's."""
    largest = 0.0
    for rows in (1, 4):
        inputs = random_inputs(modalities, size, rows=rows, seed=rows)
        wanted, given = original(*inputs), exported(*inputs)
        for name, exact, other in zip(OUTPUTS, wanted, given, strict=True):
            scale = 1 + exact if name == "evidence" else 1.0
            difference = ((exact.float() - other.float()) / scale).abs().max().item()
            largest = max(largest, difference)
    return largest


def sidecar(trained: Trained, agreement: dict[str, float]) -> dict[str, Any]:
    """What a program that uses the exported model has to know."""
    data, modalities = trained.run.config.data, trained.modalities
    return {
        "files": sorted(agreement),
        "modalities": list(modalities),
        "views": list(trained.views),
        "classes": list(trained.classes),
        "inputs": {
            "present": "(batch, modalities) bool: which images there are, in this order",
            **dict.fromkeys(modalities, "(batch, 3, size, size) float32, preprocessed"),
        },
        "outputs": {
            "belief": "(batch, classes) belief in each class; with uncertainty it sums to 1",
            "uncertainty": "(batch,) vacuity in (0, 1]",
            "probability": "(batch, classes) expected probabilities",
            "conflict": "(batch,) how much the modalities contradict each other, in [0, 1]",
            "evidence": "(batch, views, classes) of every view; without meaning where not present",
            "view_present": "(batch, views) bool",
        },
        "preprocessing": {
            "image_size": SIZES[trained.run.config.model.size].image,
            "decode": "RGB, upright, the whole frame",
            "resize": "to a square of image_size, triangle filter, antialiased, rounded to uint8",
            "normalize": data.normalize,
            "normalize_meaning": {
                "fixed": "(x / 255 - mean) / std, by channel",
                "image": "(x - m) / sqrt(v + 1), m and v mean and variance of the image's channel",
            }[data.normalize],
            "mean": {name: list(data.mean.get(name, IMAGENET_MEAN)) for name in modalities},
            "std": {name: list(data.std.get(name, IMAGENET_STD)) for name in modalities},
            "missing": "zeros, with present false",
        },
        "largest_difference_from_original": agreement,
        "torch": torch.__version__,
        "not_a_medical_device": True,
    }
