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
import os
import shutil
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np

from mics_fast.common.errors import InputError
from mics_fast.common.files import open_regular, renamed, restored_cell
from mics_fast.data.rows import SPLITS, Columns, Texts
from mics_fast.data.shards import image_exists
from mics_fast.data.tables import open_table

RESERVED = ("id", "label", "labelled", "group", "split", "virtual")
INDEXED_FROM = 4 << 20  # bytes of a CSV; a smaller one is read in less than half a second
_LARGEST = 1 << 34  # bytes of a CSV
_FORMAT = "1"
_NUMBERS = {"label": np.int32, "labelled": np.bool_, "group": np.int32, "split": np.int8}


@dataclass(frozen=True)
class Contents:
    """A manifest with all of its rows and modalities.

    Args:
        classes: sorted names.
        columns: of all rows.
        found: modalities whose files have been seen to exist.
    """

    classes: tuple[str, ...]
    columns: Columns
    found: frozenset[str]


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
        return _parsed(path, modalities, files_exist)
    digest = _digest(path)
    held = _opened(path, digest)
    if held is None or not _suffices(held, path, modalities, files_exist):
        with _one_at_a_time(path):
            held = _opened(path, digest)
            if held is None or not _suffices(held, path, modalities, files_exist):
                held = _made(path, digest, modalities, files_exist, held)
    return held


def chosen_modalities(
    path: Path, available: Collection[str], modalities: Sequence[str] | None
) -> tuple[str, ...]:
    """Return the modalities to use, by default all that are available.

    Raises:
        InputError: there is none, or one is not available.
    """
    chosen = tuple(available if modalities is None else modalities)
    for name in chosen:
        if name not in available:
            raise InputError(f"manifest {path} has no modality {name}, only {', '.join(available)}")
    if not chosen:
        raise InputError(f"manifest {path} has no modality: no column beside {', '.join(RESERVED)}")
    return chosen


# The CSV


class _Texts:
    """A column of texts that grows."""

    def __init__(self) -> None:
        self.text, self.bounds = bytearray(), array("q", [0])

    def append(self, cell: str) -> None:
        self.text += cell.encode()
        self.bounds.append(len(self.text))

    def done(self) -> Texts:
        return Texts(np.frombuffer(self.text, np.uint8), np.frombuffer(self.bounds, np.int64))


def _parsed(
    path: Path,
    modalities: Sequence[str] | None,
    files_exist: bool,
    found: Collection[str] = (),
) -> Contents:
    """Read the CSV; files of the modalities in ``found`` are not looked for again."""
    what, folder = f"manifest {path}", path.parent.absolute()
    label, labelled, group, split = array("i"), array("b"), array("i"), array("b")
    ids, virtual = _Texts(), _Texts()
    names: dict[str, int] = {}
    groups: dict[str, int] = {}
    seen: set[str] = set()
    count = 0  # groups so far
    with open_table(path, what, _LARGEST) as table:
        columns = tuple(map(restored_cell, table.columns))
        for name in RESERVED:
            if name not in columns:
                raise InputError(
                    f"{what} has no column {name}, wanted {', '.join(RESERVED)} and one for "
                    f"each modality, {table.found}"
                )
        if len(set(columns)) < len(columns):
            raise InputError(f"{what} has two columns of one name, wanted different names")
        place = {name: number for number, name in enumerate(columns)}
        reserved = itemgetter(*(place[name] for name in RESERVED))
        files = {name: _Texts() for name in columns if name not in RESERVED}
        available = [(place[name], texts) for name, texts in files.items()]
        chosen = chosen_modalities(path, files, modalities)
        looked_for = [name for name in chosen if files_exist and name not in found]
        for line, raw in table.lines:
            cells = list(map(restored_cell, raw))
            own = reserved(cells)
            problem = _problem(own, seen)
            if not problem and not any(cells[k] for k, _ in available):
                problem = f"no image in any of {', '.join(files)}"
            for name in looked_for:
                cell = cells[place[name]]
                if not problem and cell and not _exists(os.path.join(folder, cell)):
                    problem = f"the {name} image {folder / cell} does not exist"
            if problem:
                raise InputError(f"{what}, line {line}: {problem}")
            seen.add(own[0])
            ids.append(own[0])
            label.append(names.setdefault(own[1], len(names)) if own[1] else -1)
            labelled.append(own[2] == "1")
            number = groups.setdefault(own[3], count) if own[3] else count
            count = max(count, number + 1)
            group.append(number)
            split.append(SPLITS.index(own[4]))
            virtual.append(own[5])
            for k, texts in available:
                texts.append(cells[k])
    if not label:
        raise InputError(f"{what} has no row")
    classes = tuple(sorted(names))
    number_of = {name: number for number, name in enumerate(classes)}
    by_name = [*(number_of[name] for name in names), -1]  # label -1 indexes the last one
    return Contents(
        classes,
        Columns(
            folder,
            np.array(by_name, np.int32)[np.frombuffer(label, np.int32)],
            np.frombuffer(labelled, np.bool_),
            np.frombuffer(group, np.int32),
            np.frombuffer(split, np.int8),
            ids.done(),
            virtual.done(),
            {name: texts.done() for name, texts in files.items()},
        ),
        frozenset({*found, *looked_for}),
    )


def _exists(file: str) -> bool:
    """Return whether an image exists, as ``image_exists``, which takes three times as long."""
    return image_exists(Path(file)) if ".tar" in file else os.path.isfile(file)


def _problem(reserved: Sequence[str], seen: Collection[str]) -> str:
    """Describe an invalid reserved cell of a row; "" if there is none."""
    name, label, labelled, _, split, _ = reserved
    if not name or name in seen:
        return f"id {name!r} is {'used twice' if name else 'empty'}"
    if split not in SPLITS:
        return f"split is {split!r}, wanted one of {', '.join(SPLITS)}"
    if labelled not in ("0", "1"):
        return f"labelled is {labelled!r}, wanted 0 or 1"
    if labelled == "1" and not label:
        return "labelled is 1, but the label is empty"
    return ""


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
    """Read the CSV, store its index, and map it."""
    from safetensors import SafetensorError  # an extra, and of use for large manifests alone
    from safetensors.numpy import save_file

    built = _parsed(path, modalities, files_exist, before.found if before else ())
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
