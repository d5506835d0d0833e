"""An exported model: ONNX, and a JSON sidecar that says how its inputs are made.

The ``torch.export`` program beside it is never read here: loading one unpickles.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mics_fast.common.errors import InputError
from mics_fast.data.loaders import EvalLoader, PairBatch
from mics_fast.data.manifest import Row
from mics_fast.evaluation.opinions import Opinions, assemble
from mics_fast.options import DataConfig

PROGRAM, ONNX, SIDECAR, CARD = "model.pt2", "model.onnx", "model.json", "MODEL_CARD.md"
OUTPUTS = ("belief", "uncertainty", "probability", "conflict", "evidence", "view_present")
BATCH = 16


@dataclass
class Exported:
    """A classifier that answers without the code that trained it.

    Args:
        session: of ONNX Runtime.
        modalities, views, classes: names, in the order of the model's inputs and outputs.
        data: how images are normalised.
        image_size: side of the images, pixels.
    """

    session: Any
    modalities: tuple[str, ...]
    views: tuple[str, ...]
    classes: tuple[str, ...]
    data: DataConfig
    image_size: int

    @staticmethod
    def open(folder: Path) -> Exported:
        """Read the folder that ``python -m mics_fast.export`` wrote.

        Raises:
            InputError: it is damaged, or ONNX Runtime is not installed.
        """
        try:
            sidecar = json.loads((folder / SIDECAR).read_text())
            made = sidecar["preprocessing"]
            described = (
                tuple(sidecar["modalities"]),
                tuple(sidecar["views"]),
                tuple(sidecar["classes"]),
                DataConfig(normalize=made["normalize"], mean=made["mean"], std=made["std"]),
                made["image_size"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{folder / SIDECAR} is not that of an exported model: {error}"
            ) from None
        return Exported(open_session(folder / ONNX), *described)

    def loader(self, rows: Sequence[Row]) -> EvalLoader:
        """Batches of whole frames, normalised as in training."""
        return EvalLoader(
            rows,
            self.modalities,
            data=self.data,
            image_size=self.image_size,
            batch_size=BATCH,
            device=torch.device("cpu"),
        )

    def answer(self, batch: PairBatch) -> Opinions:
        """What the model says of one batch."""
        inputs = {name: batch.views[name].numpy() for name in self.modalities}
        outputs = self.session.run(OUTPUTS, inputs | {"present": batch.present.numpy()})
        said = dict(zip(OUTPUTS, map(torch.from_numpy, outputs), strict=True))
        return assemble(self.modalities, self.views, said["evidence"], said["view_present"], batch)


def open_session(file: Path) -> Any:
    """An ONNX model, ready to run on the CPU.

    Raises:
        InputError: no such file, not ONNX, or ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise InputError(
            f"{file} needs ONNX Runtime, wanted: pip install 'mics-fast[export]'"
        ) from None
    if not file.exists():
        raise InputError(f"{file} does not exist; it was exported without the [export] extra")
    try:
        return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises classes of its own for a damaged file
        raise InputError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
