"""Initial weights of the encoders, from a file of a vision transformer with timm's names.

The parameters have the names of timm's ``VisionTransformer``, possibly nested in dictionaries such
as "model", "state_dict" or "teacher", or with a common prefix. Positions of another grid are
resampled. Networks with parts that the encoder lacks are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mics_fast.common.errors import InputError
from mics_fast.common.files import open_regular
from mics_fast.common.tensors import check_size, load_tensors
from mics_fast.models.vit import PLAIN, Parts, VisionTransformer

_ANCHOR = "patch_embed.proj.weight"
MOST_LEVELS, MOST_NAMES = 4, 100_000  # of nested dictionaries; of tensors
# Parts of other networks that change a block or a token. Other parts (heads, decoders, a norm
# after the pooling) come after the tokens and are ignored.
_FOREIGN = re.compile(r"(blocks\.|patch_embed\.|norm_pre\.|reg_token|dist_token|storage_tokens)")


def load_initial_weights(file: Path, encoders: Sequence[nn.Module], prefix: str = "") -> str:
    """Initialise encoders of one architecture from a file.

    Args:
        file: a safetensors file, or tensors saved by ``torch.save``; any name.
        encoders: at least one ``VisionTransformer``; all get the same weights.
        prefix: as for ``unwrapped``.

    Returns:
        A sentence about the matched, resampled and unused tensors.

    Raises:
        InputError: the file cannot be read, holds no such network, or one with another width,
            depth, patch size or part.
    """
    given = unwrapped(file, read_tensors(file), prefix)
    own = encoders[0].state_dict()
    check_architecture(file, given, own)
    notes = []
    matched = {name: tensor for name, tensor in given.items() if name in own}
    if "pos_embed" in matched:
        has_class = "cls_token" in given
        assert isinstance(encoders[0], VisionTransformer)
        parts = encoders[0].parts
        positions, note = fit_positions(
            file, matched["pos_embed"].float(), own["pos_embed"], has_class, parts
        )
        matched["pos_embed"] = positions
        notes += [note] if note else []
    for name, tensor in matched.items():
        if tensor.shape != own[name].shape:
            raise InputError(
                f"model.init {file}: {name} is {tuple(tensor.shape)}, "
                f"wanted {tuple(own[name].shape)}"
            )
    for encoder in encoders:
        encoder.load_state_dict({**own, **matched})  # copies, in the encoder's own type
    kept, left = own.keys() - matched.keys(), given.keys() - own.keys()
    notes += [f"not in the file, as initialised: {_names(kept)}"] if kept else []
    notes += [f"left out of the file: {_names(left)}"] if left else []
    return "; ".join([f"encoder from {file}: {len(matched)} of {len(own)} tensors", *notes])


def read_tensors(file: Path) -> Any:
    """Read the content of a weights file without executing code.

    The format is recognised by the first bytes, not by the name: ``.bin``, ``.ckpt`` and
    ``.pth.tar`` are common names of files that ``torch.save`` wrote.

    Raises:
        InputError: the file is missing, has neither format, or contains other objects.
    """
    try:
        with open_regular(file) as opened:
            check_size(opened)
            head = opened.read(9)
            if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < file.stat().st_size:
                from safetensors.torch import load_file

                return load_file(file)
            if head[:2] in (b"PK", b"\x80\x02"):  # a zip archive; a pickle of torch before 1.6
                return load_tensors(opened)
    except InputError as error:
        raise InputError(f"model.init {error}") from None
    except Exception as error:  # both libraries raise many kinds of errors
        raise InputError(f"model.init {file} cannot be read: {_reason(file, error)}") from None
    raise InputError(
        f"model.init {file} is neither a safetensors file nor one that torch.save wrote"
    )


def _reason(file: Path, error: Exception) -> str:
    """Explain why a file cannot be read; name foreign classes in it, if they are the reason."""
    if isinstance(error, UnpicklingError):
        with suppress(Exception):
            found = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            if found:
                return (
                    f"it holds objects of {_names(found)}, and loading those could run code; save "
                    "its tensors alone"
                )
    return " ".join(str(error).split()).split(". ")[0]


def unwrapped(file: Path, content: Any, prefix: str = "") -> dict[str, Tensor]:
    """Find the tensors of the vision transformer in a file, with timm's names.

    Args:
        file: for messages.
        content: named tensors, in nested dictionaries.
        prefix: of the names, if the file holds several networks, as in "teacher.backbone".

    Raises:
        InputError: there is no such network, or more than one.
    """
    try:
        tensors = flattened(content)
    except InputError as error:
        raise InputError(f"model.init {file} cannot be used: {error}") from None
    prefixes = sorted(name.removesuffix(_ANCHOR) for name in tensors if _is_anchor(name))
    wanted = [own for own in prefixes if own.rstrip(".") == prefix.rstrip(".")]
    chosen = wanted if prefix else prefixes
    if len(chosen) != 1:
        found = f"{len(prefixes)} of them, below {_names(prefixes)}" if prefixes else "none"
        hint = f"; choose one by model.init_prefix {prefixes[0].rstrip('.')}" if prefixes else ""
        raise InputError(
            f"model.init {file} holds {found}, wanted one vision transformer in timm's naming "
            f"({_ANCHOR}, blocks.0.attn.qkv.weight, ...)"
            + (f" below model.init_prefix {prefix}" if prefix else hint)
        )
    start = chosen[0]
    return {n.removeprefix(start): own for n, own in tensors.items() if n.startswith(start)}


def flattened(content: Any) -> dict[str, Tensor]:
    """Flatten nested dictionaries to dotted names, up to ``MOST_LEVELS`` deep.

    Raises:
        InputError: more than ``MOST_NAMES`` names.
    """
    level, tensors = {"": content}, dict[str, Tensor]()
    for _ in range(MOST_LEVELS):
        below: dict[str, Any] = {}
        for prefix, own in level.items():
            if isinstance(own, Tensor):
                tensors[prefix.removesuffix(".")] = own
            elif isinstance(own, Mapping):
                if len(below) + len(own) > MOST_NAMES:
                    raise InputError(f"it holds more than {MOST_NAMES} names, wanted one network")
                below |= {f"{prefix}{name}.": value for name, value in own.items()}
        level = below
    return tensors


def check_architecture(file: Path, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse an encoder of another architecture.

    Raises:
        InputError: names the file, its content and the expected architecture.
    """
    theirs, ours = describe(given), describe(own)
    if theirs != ours:
        raise InputError(
            f"model.init {file} holds an encoder of {theirs}, but model.size wants one of {ours}"
        )
    foreign = sorted(name for name in given if name not in own and _FOREIGN.match(name))
    if foreign:
        raise InputError(
            f"model.init {file} holds {_names(foreign)}, which the encoders of this project do "
            "not have: they would compute something else"
        )
    # Class token, biases and the last norm have neutral initial values, so they may be absent.
    lacking = [
        name
        for name, tensor in own.items()
        if name not in given and tensor.ndim > 1 and name != "cls_token"
    ]
    if lacking:
        raise InputError(f"model.init {file} lacks {_names(lacking)}")


def describe(state: Mapping[str, Tensor]) -> str:
    """Describe width, depth and patch size of a vision transformer."""
    width, *patch = state[_ANCHOR].shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    return f"width {width}, depth {depth} and patches of {' x '.join(map(str, patch))}"


def fit_positions(
    file: Path, given: Tensor, own: Tensor, has_class_token: bool, parts: Parts = PLAIN
) -> tuple[Tensor, str]:
    """Resample the positions of a file to the encoder's grid.

    Args:
        file: for error messages.
        given: (1, N, D) of a square grid, or (1, P + N, D) with the P class and register tokens
            first.
        own: (1, P + M, D) of the encoder; (1, M, D) if its prefix has no positions.
        has_class_token: True if the file has a class token. Without a position in the file, it
            gets position zero; without a class token, the encoder's own is kept.
        parts: of the encoder.

    Returns:
        Positions in the shape of ``own``, and a note on the changes, "" if there are none.

    Raises:
        InputError: an unexpected number of positions, or another shape.
    """
    if given.ndim != 3 or len(given) != 1:
        raise InputError(f"model.init {file}: pos_embed is {tuple(given.shape)}, wanted (1, N, D)")
    prefix = 1 + parts.registers if parts.prefix_positions else 0
    stated = prefix if not _is_square(given.shape[1]) or not prefix else 0
    if not _is_square(given.shape[1] - stated):
        raise InputError(
            f"model.init {file}: pos_embed has {given.shape[1]} positions, wanted those of a "
            "square grid, with or without one of the class token"
        )
    first, patches = given[:, :stated], given[:, stated:]
    notes = []
    if prefix and not stated:
        first = torch.zeros_like(own[:, :prefix]) if has_class_token else own[:, :prefix]
        notes.append("the class token has no position in the file")
    before, after = (round(x.shape[1] ** 0.5) for x in (patches, own[:, prefix:]))
    if before != after:
        patches = resample_positions(patches, after, antialias=parts.antialias)
        notes.append(f"positions resampled from {before} x {before} to {after} x {after}")
    return torch.cat([first, patches], dim=1), "; ".join(notes)


def resample_positions(positions: Tensor, side: int, *, antialias: bool = True) -> Tensor:
    """Resample a square grid bicubically: (1, n * n, D) -> (1, side * side, D)."""
    before = round(positions.shape[1] ** 0.5)
    grid = positions.unflatten(1, (before, before)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=antialias)
    return grid.permute(0, 2, 3, 1).flatten(1, 2)


def _is_anchor(name: object) -> bool:
    return f".{name}".endswith(f".{_ANCHOR}")


def _is_square(number: int) -> bool:
    return round(number**0.5) ** 2 == number


def _names(names: Iterable[str]) -> str:
    """List a few names, sorted, and the number of others."""
    ordered = sorted(names)
    more = [f"{len(ordered) - 6} more"] if len(ordered) > 6 else []
    return ", ".join([*ordered[:6], *more])
