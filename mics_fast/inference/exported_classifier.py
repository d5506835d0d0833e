"""An exported classifier: an ONNX model, and a JSON sidecar that describes its inputs.

The ``torch.export`` program beside it is never read, because loading one unpickles.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mics_fast.common.errors import InputError
from mics_fast.common.files import open_regular, read_json
from mics_fast.common.tensors import memory_limit
from mics_fast.data.loaders import EvalLoader, PairBatch
from mics_fast.data.manifest import Row
from mics_fast.evaluation.operating_point import OperatingPoint
from mics_fast.evaluation.opinions import Opinions, assemble
from mics_fast.inference.description import Description, read_description
from mics_fast.options import DataConfig

PROGRAM, ONNX, SIDECAR, CARD = "model.pt2", "model.onnx", "model.json", "MODEL_CARD.md"
OUTPUTS = ("belief", "uncertainty", "probability", "conflict", "evidence", "view_present")
METADATA = "mics_fast"
"""Key of the description in the metadata of the ONNX model."""
BATCH = 16
_LARGEST = 2**31  # bytes of an ONNX file
_CONTROL = {"If", "Loop", "Scan", "SequenceMap"}  # of which no export has one; a loop may not end


@dataclass
class ExportedClassifier:
    """A classifier that runs without the code that trained it.

    Args:
        file: The ONNX model, for messages.
        session: ONNX Runtime session.
        description: Names in the order of inputs and outputs, and preprocessing.
    """

    file: Path
    session: Any
    description: Description

    @staticmethod
    def open(folder: Path) -> ExportedClassifier:
        """Open a folder that ``python -m mics_fast.export`` wrote.

        Raises:
            InputError: it is damaged, its parts disagree, or ONNX Runtime is not installed.
        """
        description = read_sidecar(folder / SIDECAR)
        session = open_session(folder / ONNX)
        check_model(session, description, folder)
        return ExportedClassifier(folder / ONNX, session, description)

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.description.modalities

    @property
    def heads(self) -> tuple[str, ...]:
        return self.description.views

    @property
    def classes(self) -> tuple[str, ...]:
        return self.description.classes

    @property
    def data(self) -> DataConfig:
        return self.description.data

    @property
    def image_size(self) -> int:
        return self.description.image_size

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def point(self) -> OperatingPoint:
        return self.description.point

    def loader(self, rows: Sequence[Row], data: DataConfig | None = None) -> EvalLoader:
        """Make batches of whole frames, normalised as in training."""
        return EvalLoader(
            rows,
            self.modalities,
            data=data or self.data,
            image_size=self.image_size,
            batch_size=BATCH,
            device=self.device,
        )

    def state(self, batch: PairBatch) -> Opinions:
        """Compute the opinions on one batch."""
        inputs = {name: batch.views[name].numpy() for name in self.modalities}
        wanted = ("evidence", "view_present")
        try:
            outputs = self.session.run(wanted, inputs | {"present": batch.present.numpy()})
        except Exception as error:  # ONNX Runtime raises classes of its own
            reason = " ".join(str(error).split())
            raise InputError(f"{self.file} cannot be run: {reason}") from error
        evidence, present = map(torch.from_numpy, outputs)
        return assemble(self.modalities, self.heads, evidence, present, batch)


def read_sidecar(file: Path) -> Description:
    """Read and check the description beside an exported model.

    Raises:
        InputError: it cannot be read, or its content is invalid.
    """
    sidecar = read_json(file)
    try:
        made = sidecar["preprocessing"]
        values = {name: sidecar[name] for name in ("modalities", "views", "classes")}
        values["operating_point"] = sidecar["operating_point"]
        values |= {name: made[name] for name in ("image_size", "normalize", "mean", "std")}
    except (KeyError, TypeError) as error:
        raise InputError(f"{file} is not that of an exported model: {error}") from None
    return read_description(values, file)


def check_model(session: Any, description: Description, folder: Path) -> None:
    """Refuse an ONNX model that does not match its sidecar.

    Raises:
        InputError: names the difference.
    """
    stored = session.get_modelmeta().custom_metadata_map.get(METADATA)
    if stored is None:
        raise InputError(f"{folder / ONNX} has no metadata of mics-fast, wanted an exported model")
    try:
        values = json.loads(stored)
    except (ValueError, RecursionError):
        values = None
    inside = read_description(values, f"the metadata of {folder / ONNX}")
    for field in (
        "modalities",
        "views",
        "classes",
        "image_size",
        "normalize",
        "mean",
        "std",
        "point",
    ):
        if getattr(inside, field) != getattr(description, field):
            raise InputError(
                f"{folder / SIDECAR} and {folder / ONNX} disagree about {field}, wanted the files "
                "of one export"
            )
    side, classes = description.image_size, len(description.classes)
    wanted = {name: [3, side, side] for name in description.modalities}
    wanted |= {"present": [len(description.modalities)]}
    check_shapes(session.get_inputs(), wanted, folder / ONNX)
    opinions = len(description.views)
    outputs = {"evidence": [opinions, classes], "view_present": [opinions], "belief": [classes]}
    check_shapes(session.get_outputs(), outputs, folder / ONNX, others=True)


def check_shapes(
    tensors: Sequence[Any], wanted: dict[str, list[int]], file: Path, *, others: bool = False
) -> None:
    """Refuse tensors with other names, or with other shapes beyond the batch dimension.

    Raises:
        InputError: names the first such tensor.
    """
    found = {tensor.name: list(tensor.shape[1:]) for tensor in tensors}
    for name in wanted.keys() | (set() if others else found.keys()):
        if found.get(name) != wanted.get(name):
            raise InputError(
                f"{file} has {name} of shape {found.get(name)} per sample, wanted "
                f"{wanted.get(name)}, as {SIDECAR} says"
            )


def open_session(file: Path) -> Any:
    """Load an ONNX model for the CPU.

    The file is read here, not by its name: then ONNX Runtime reads no other file that it refers to.

    Raises:
        InputError: the file is missing, irregular, not ONNX or a model with loops, or ONNX Runtime
            is not installed.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError:
        raise InputError(
            f"{file} needs ONNX Runtime, wanted: pip install 'mics-fast[export]'"
        ) from None
    if not file.exists():
        raise InputError(f"{file} does not exist; it was exported without the [export] extra")
    with open_regular(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > _LARGEST:
            raise InputError(f"{file} has {size / 2**30:.0f} GiB, wanted at most 2, as ONNX has")
        data = opened.read()
    try:
        operators = {node.op_type for node in onnx.load_model_from_string(data).graph.node}
        if not operators.isdisjoint(_CONTROL):
            raise InputError(f"{file} holds {min(operators & _CONTROL)}, wanted no control flow")
        return onnxruntime.InferenceSession(
            data, session_options(), providers=["CPUExecutionProvider"]
        )
    except InputError:
        raise
    except Exception as error:  # both raise classes of their own for a damaged file
        raise InputError(f"{file} cannot be read: {' '.join(str(error).split())}") from error


def session_options() -> Any:
    """Limit the memory of a session: a small model can ask for any amount.

    What goes wrong is raised, not logged.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    _limit_memory()
    options.add_session_config_entry("session.use_env_allocators", "1")
    return options


@cache
def _limit_memory() -> None:
    """Give the sessions of this process an allocator that ends at half of the machine's memory."""
    import onnxruntime

    kind = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    place = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, onnxruntime.OrtMemType.DEFAULT)
    limits = {
        "max_mem": memory_limit(),
        "arena_extend_strategy": 1,  # as much as is asked for
        "initial_chunk_size_bytes": -1,
        "max_dead_bytes_per_chunk": -1,
    }
    onnxruntime.create_and_register_allocator(place, onnxruntime.OrtArenaCfg(limits))
