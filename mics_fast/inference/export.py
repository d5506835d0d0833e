"""Export: the classifier of a run as files that can be used without this package.

model.pt2       ``torch.export`` program
model.onnx      the same for ONNX Runtime, if the [export] extra is installed
model.json      names of inputs and outputs, preprocessing, agreement with the original
MODEL_CARD.md   data, metrics with intervals, limits
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from mics_fast.common.errors import RunFailed
from mics_fast.common.files import renamed
from mics_fast.evaluation.operating_point import OperatingPoint
from mics_fast.evaluation.opinions import mean_evidence, mirrored
from mics_fast.inference.description import NORMALIZE_MEANING, Description, describe_model
from mics_fast.inference.exported_classifier import (
    METADATA,
    ONNX,
    OUTPUTS,
    PROGRAM,
    open_session,
)
from mics_fast.inference.run_classifier import RunClassifier
from mics_fast.models.classifier import Classifier
from mics_kernels import conflict, fuse_evidence

# Outputs lie in [0, 1] except evidence, which is compared relative to evidence + 1.
TOLERANCE = 1e-4


class Answering(nn.Module):
    """A classifier that maps normalised images to answers by plain tensor operations.

    Args:
        model: In evaluation mode.
        point: Calibration of the fused opinion, and the referral rule.
    """

    def __init__(self, model: Classifier, point: OperatingPoint) -> None:
        super().__init__()
        self.model, self.point = model, point

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs of ``forward``."""
        return (*OUTPUTS, "refer") if self.point.rule else OUTPUTS

    def forward(self, present: Tensor, *images: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs named by ``outputs``.

        Args:
            present: True for each available image, (B, M) bool.
            images: One per modality, (B, 3, H, H) float32.

        Returns:
            Fused belief (B, C), uncertainty (B,), probability (B, C); conflict of the modalities
            (B,); evidence (B, V, C) and presence (B, V) of every opinion; with a rule also the
            referral (B,) bool.
        """
        views = dict(zip(self.model.modalities, images, strict=True))
        outputs = [self.model(own, present) for own in mirrored(views, self.point.flips)]
        evidence, output = mean_evidence(outputs), outputs[0]
        stated = self.point.opinion(
            fuse_evidence(evidence, present=output.present, backend="reference")
        )
        disagreement = conflict(evidence[:, : len(images)], present=present)
        answer = (*stated, disagreement, evidence, output.present)
        rule = self.point.rule
        if rule is None:
            return answer
        return (*answer, rule.compare(stated.uncertainty, stated.probability.amax(1)))


def export_model(classifier: RunClassifier, out: Path) -> dict[str, float]:
    """Write the program and, if ONNX is installed, the ONNX model.

    Returns:
        File name -> largest difference from the original on random inputs.

    Raises:
        RunFailed: a difference is above the tolerance.
    """
    module = Answering(classifier.model.cpu(), classifier.point).eval()
    modalities, size = classifier.modalities, classifier.image_size
    program = trace(module, modalities, size)
    whole = io.BytesIO()  # writing to a full disk itself, torch would end the process
    torch.export.save(program, whole)
    with renamed(out / PROGRAM) as partial:
        partial.write_bytes(whole.getbuffer())
    agreement = {PROGRAM: largest_difference(module, program.module(), modalities, size)}
    if all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        write_onnx(program, description_of(classifier), module.outputs, out / ONNX)
        session = open_session(out / ONNX)

        def run(*given: Tensor) -> list[Tensor]:
            named = zip(("present", *modalities), given, strict=True)
            outputs = session.run(module.outputs, {name: tensor.numpy() for name, tensor in named})
            return [torch.from_numpy(output) for output in outputs]

        agreement[ONNX] = largest_difference(module, run, modalities, size)
    else:
        print("no ONNX model: onnx is not installed, wanted: pip install 'mics-fast[export]'")
    for name, largest in agreement.items():
        if not largest <= TOLERANCE:
            raise RunFailed(
                f"{out / name} differs from the original by {largest:.1e}, wanted at most "
                f"{TOLERANCE:.0e}"
            )
    return agreement


def trace(module: Answering, modalities: Sequence[str], size: int) -> ExportedProgram:
    """Trace the module for any batch size, without paths of source files."""
    inputs = random_inputs(modalities, size, rows=3, seed=0)
    batch = torch.export.Dim("batch", min=1)
    shapes = {"present": {0: batch}, "images": ({0: batch},) * len(modalities)}
    program = torch.export.export(module, inputs, dynamic_shapes=shapes)
    for part in program.graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


def write_onnx(
    program: ExportedProgram, description: Description, outputs: Sequence[str], file: Path
) -> None:
    """Convert a program to one ONNX file that contains its description."""
    # Otherwise torch warns about missing torchvision operators, which are not used here.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from torch's own code
        translated = torch.onnx.export(
            program,
            input_names=["present", *description.modalities],
            output_names=list(outputs),
            dynamo=True,
            verbose=False,
        )
    assert translated is not None
    model = translated.model_proto
    strip_traces(model)
    model.metadata_props.add(key=METADATA, value=description.text())
    with renamed(file) as partial:
        partial.write_bytes(model.SerializeToString())


def strip_traces(model: Any) -> None:
    """Remove traces of source files from an ONNX model."""
    del model.metadata_props[:]
    for graph in (model.graph, *model.functions):
        graph.doc_string = ""
        del graph.metadata_props[:]
        for part in (*graph.node, *graph.value_info):
            part.doc_string = ""
            del part.metadata_props[:]
    for part in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]


def random_inputs(
    modalities: Sequence[str], size: int, *, rows: int, seed: int
) -> tuple[Tensor, ...]:
    """Draw presence, (rows, M), and one noise image per modality, (rows, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(rows, len(modalities), generator=generator) < 0.7
    images = torch.randn(len(modalities), rows, 3, size, size, generator=generator)
    return (present, *images.unbind(0))


@torch.no_grad()
def largest_difference(
    original: Answering,
    exported: Callable[..., Sequence[Tensor]],
    modalities: Sequence[str],
    size: int,
) -> float:
    """Compare all outputs on random inputs, with batch sizes other than the traced one."""
    largest = 0.0
    for rows in (1, 4):
        inputs = random_inputs(modalities, size, rows=rows, seed=rows)
        wanted, given = original(*inputs), exported(*inputs)
        for name, exact, other in zip(original.outputs, wanted, given, strict=True):
            if name == "refer":  # near the threshold, either value is right within the tolerance
                continue
            scale = 1 + exact if name == "evidence" else 1.0
            difference = ((exact.float() - other.float()) / scale).abs().max().item()
            largest = max(largest, difference)
    return largest


def description_of(classifier: RunClassifier) -> Description:
    """Describe the classifier of a run."""
    return describe_model(
        classifier.modalities,
        classifier.heads,
        classifier.classes,
        classifier.image_size,
        classifier.data,
        classifier.point,
    )


def sidecar(classifier: RunClassifier, agreement: dict[str, float]) -> dict[str, Any]:
    """Return the JSON description for programs that use the exported model."""
    description = description_of(classifier)
    return {
        "files": sorted(agreement),
        "modalities": description.modalities,
        "views": description.views,
        "classes": description.classes,
        "inputs": {
            "present": "(batch, modalities) bool: which images there are, in this order",
            **dict.fromkeys(description.modalities, "(batch, 3, size, size) float32, preprocessed"),
        },
        "outputs": {
            "belief": "(batch, classes) belief in each class; with uncertainty it sums to 1",
            "uncertainty": "(batch,) vacuity in (0, 1]",
            "probability": "(batch, classes) expected probabilities",
            "conflict": "(batch,) how much the modalities contradict each other, in [0, 1]",
            "evidence": "(batch, views, classes) of every opinion; undefined where not present",
            "view_present": "(batch, views) bool: which opinions were stated",
            **({"refer": "(batch,) bool: a person should decide"} if classifier.point.rule else {}),
        },
        "operating_point": description.point.json(),
        "preprocessing": {
            "image_size": description.image_size,
            "decode": "RGB, upright, the whole frame",
            "resize": "to a square of image_size, triangle filter, antialiased, rounded to uint8",
            "normalize": description.normalize,
            "normalize_meaning": NORMALIZE_MEANING[description.normalize],
            "mean": description.mean,
            "std": description.std,
            "missing": "zeros, with present false",
        },
        "largest_difference_from_original": agreement,
        "torch": torch.__version__,
        "not_a_medical_device": True,
    }
