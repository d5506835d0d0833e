"""The columns of a manifest: read from its CSV, or mapped into memory from an index beside it.

The index of ``manifest.csv`` is ``manifest.csv.index``, a safetensors file. It is made once, by the
first process that reads a large manifest, and belongs to one content of the CSV: its metadata hold
the digest of the CSV, and the modalities whose files were found when it was made. An index that is
damaged or of another content is made anew. Without the right to write one, every process reads the
CSV.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from mics_fast.common.errors import InputError
from mics_fast.common.files import open_regular, renamed
from mics_fast.data.manifest_csv import Contents, chosen_modalities, read_csv, with_files
from mics_fast.data.rows import SPLITS, Columns, Texts

INDEXED_FROM = 4 << 20  # bytes of a CSV; a smaller one is read in less than half a second
_FORMAT = "1"
_NUMBERS = {"label": np.int32, "labelled": np.bool_, "group": np.int32, "split": np.int8}


def read_contents(path: Path, modalities: Sequence[str] | None, files_exist: bool) -> Contents:
    """Read a manifest, from its index if it has one.

    Args:
        path, modalities, files_exist: as ``read_manifest``.

    Raises:
        InputError: as ``read_manifest``.
    """
    size = 0
    with suppress(OSError):
        size = path.stat().st_size
    if size < INDEXED_FROM:
        return read_csv(path, modalities, files_exist)
    digest = _digest(path)
    held = _opened(path, digest)
    if held is None or not _suffices(held, path, modalities, files_exist):
        with _one_at_a_time(path):
            held = _opened(path, digest)
            if held is None or not _suffices(held, path, modalities, files_exist):
                held = _made(path, digest, modalities, files_exist, held)
    return held


# The index


def _index_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.index")


def _digest(path: Path) -> str:
    """Return the SHA-256 of the bytes of a CSV."""
    try:
        with open_regular(path) as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"manifest {path} cannot be read: {error.strerror}") from None


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Wait until no other process of this machine makes the index."""
    with open_regular(path) as opened:
        with suppress(OSError):  # a file system without locks: each process makes its own
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def _suffices(
    held: Contents, path: Path, modalities: Sequence[str] | None, files_exist: bool
) -> bool:
    """Return whether all files that must exist have been looked for."""
    return not files_exist or held.found.issuperset(
        chosen_modalities(path, held.columns.files, modalities)
    )


def _made(
    path: Path,
    digest: str,
    modalities: Sequence[str] | None,
    files_exist: bool,
    before: Contents | None,
) -> Contents:
    """Read what no index holds, store it in one, and map that."""
    from safetensors import SafetensorError  # an extra, and of use for large manifests alone
    from safetensors.numpy import save_file

    if before is None:
        built = read_csv(path, modalities, files_exist)
    else:
        built = with_files(before, path, chosen_modalities(path, before.columns.files, modalities))
    if _digest(path) != digest:
        raise InputError(f"manifest {path} was changed while it was read")
    own = built.columns
    arrays = {name: getattr(own, name) for name in _NUMBERS}
    for name, texts in _texts_of(own).items():
        arrays |= {f"{name} text": texts.text, f"{name} bounds": texts.bounds}
    facts = {"classes": built.classes, "modalities": [*own.files], "found": sorted(built.found)}
    meta = {"format": _FORMAT, "csv": digest, "facts": json.dumps(facts)}
    try:
        with renamed(_index_of(path)) as partial:
            save_file(arrays, partial, meta)
            shutil.copymode(path, partial)  # readers of the manifest may read its index
    except (OSError, SafetensorError):
        return built
    return _opened(path, digest) or built


def _texts_of(columns: Columns) -> dict[str, Texts]:
    files = {f"file {name}": texts for name, texts in columns.files.items()}
    return {"id": columns.id, "virtual": columns.virtual, **files}


def _opened(path: Path, digest: str) -> Contents | None:
    """Map the index of a manifest; None if there is none, or none of this content."""
    from safetensors import SafetensorError, safe_open

    file = _index_of(path)
    try:
        with open_regular(file), safe_open(file, "pt") as index:
            meta = index.metadata() or {}
            if (meta.get("format"), meta.get("csv")) != (_FORMAT, digest):
                return None
            # As tensors of torch, the arrays are mapped, not read.
            arrays = {name: index.get_tensor(name).numpy() for name in index.keys()}  # noqa: SIM118
        return _checked(json.loads(meta["facts"]), arrays, path.parent.absolute())
    except (InputError, OSError, SafetensorError, LookupError, TypeError, ValueError):
        return None  # absent or damaged


def _checked(
    facts: Mapping[str, Sequence[str]], arrays: Mapping[str, np.ndarray], folder: Path
) -> Contents:
    """Make the contents from the parts of an index.

    Raises:
        LookupError, TypeError, ValueError: it is damaged.
    """
    classes = tuple(facts["classes"])
    files = {name: _text_column(arrays, f"file {name}") for name in facts["modalities"]}
    numbers = {name: arrays[name] for name in _NUMBERS}
    columns = Columns(
        folder,
        **numbers,
        id=_text_column(arrays, "id"),
        virtual=_text_column(arrays, "virtual"),
        files=files,
    )
    count = len(columns.label)
    limits = {"label": (-1, len(classes)), "group": (0, count), "split": (0, len(SPLITS))}
    for name, own in numbers.items():
        if own.dtype != _NUMBERS[name] or own.shape != (count,):
            raise ValueError(name)
    for name, (lowest, end) in limits.items():
        if count == 0 or numbers[name].min() < lowest or numbers[name].max() >= end:
            raise ValueError(name)
    if any(len(texts.bounds) != count + 1 for texts in _texts_of(columns).values()):
        raise ValueError("bounds")
    return Contents(classes, columns, frozenset(facts["found"]))


def _text_column(arrays: Mapping[str, np.ndarray], name: str) -> Texts:
    texts = Texts(arrays[f"{name} text"], arrays[f"{name} bounds"])
    bounds = texts.bounds
    if texts.text.dtype != np.uint8 or bounds.dtype != np.int64 or bounds.ndim != 1:
        raise ValueError(name)
    if bounds[0] != 0 or bounds[-1] != len(texts.text) or (np.diff(bounds) < 0).any():
        raise ValueError(name)
    return texts
