"""The encoder that a run starts from: geometry, normalisation and weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from mics_fast.common.errors import InputError
from mics_fast.common.files import open_regular, renamed
from mics_fast.common.tensors import check_size
from mics_fast.engine.checkpoint import fitting
from mics_fast.models.geometry import Geometry, as_numbers, geometry_of, stated_heads
from mics_fast.models.initial_weights import load_initial_weights, read_tensors, unwrapped
from mics_fast.models.sizes import SIZES, size_of
from mics_fast.models.vit import VisionTransformer
from mics_fast.models.weights import find_weights
from mics_fast.options import ModelConfig, TrainConfig, check_config
from mics_fast.training.run import Run

ENCODER = "encoder.safetensors"  # in the folder of a run with frozen encoders


def with_encoder(config: TrainConfig, modalities: Sequence[str]) -> TrainConfig:
    """Write the facts that ``model.init`` names into the options, for later readers of the run.

    Args:
        config: of a run. Where the geometry is stored, nothing is looked up again.
        modalities: whose mean and standard deviation are set where none are given.

    Returns:
        Options with ``model.geometry``, ``model.init`` pinned to a commit or an absolute path, and
        ``data.mean`` and ``data.std`` of the weights.

    Raises:
        InputError: weights that cannot be found or are of no network that is supported.
    """
    model = config.model
    if not model.init or model.geometry:
        return config
    weights = find_weights(model.init)
    tensors = unwrapped(weights.file, read_tensors(weights.file), model.init_prefix)
    found = geometry_of(f"model.init {weights.name}", tensors, weights.config)
    if config.finetune.encoder != "full" and "cls_token" not in tensors:
        raise InputError(
            f"model.init {weights.name} has no class token (cls_token), wanted one where "
            f"finetune.encoder is {config.finetune.encoder}: a new one would never be trained"
        )
    geometry = found if stated_heads(weights.config) else _with_heads(found, model)
    data = config.data
    if geometry.mean and geometry.std and data.normalize == "fixed":
        mean = dict.fromkeys(modalities, geometry.mean) | data.mean
        std = dict.fromkeys(modalities, geometry.std) | data.std
        data = replace(data, mean=mean, std=std)
    model = replace(model, init=weights.name, geometry=as_numbers(geometry))
    config = replace(config, model=model, data=data)
    check_config(config)
    return config


def _with_heads(geometry: Geometry, model: ModelConfig) -> Geometry:
    """Take the number of heads from ``model.size`` if the encoder is of that size."""
    like = SIZES[model.size]
    same = (like.width, like.depth, like.patch) == (geometry.width, geometry.depth, geometry.patch)
    return replace(geometry, heads=like.heads) if same else geometry


def load_start(model: ModelConfig, encoders: Sequence[nn.Module]) -> str:
    """Load encoders from ``model.init``; return a sentence about the matched tensors.

    Raises:
        InputError: as ``find_weights`` and ``load_initial_weights``.
    """
    return load_initial_weights(find_weights(model.init).file, encoders, model.init_prefix)


def write_encoder(run: Run, encoder: VisionTransformer) -> None:
    """Store the frozen encoder of a run beside its checkpoints, which hold the rest."""
    with renamed(run.folder / ENCODER) as partial:
        state = encoder.state_dict()
        partial.write_bytes(save({name: own.cpu().contiguous() for name, own in state.items()}))


def read_encoder(run: Run) -> VisionTransformer:
    """Load the frozen encoder of a run, in evaluation mode.

    Raises:
        InputError: it is gone, damaged, or of another network than the options say.
    """
    file = run.folder / ENCODER
    if not file.exists():
        raise InputError(f"{file} is missing, wanted the frozen encoder of the run")
    encoder = size_of(run.config.model).encoder()
    with open_regular(file) as opened:
        try:
            check_size(opened)
            state = load_file(file)
        except (OSError, SafetensorError, ValueError) as error:
            raise InputError(f"{file} cannot be read: {' '.join(str(error).split())}") from None
    with fitting(str(file)):
        encoder.load_state_dict(state)
    return encoder.eval().requires_grad_(False)
