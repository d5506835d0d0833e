"""Files of tensors from elsewhere: loaded without executing code, and never larger than they are.

``weights_only`` keeps a file from running code, not from exhausting memory: a compressed archive
grows a thousandfold, and a tensor of stride 0 can state a million times the values that it holds.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping
from io import BufferedReader
from typing import Any

import torch
from torch import Tensor

_MOST_COPIES = 4  # of the bytes of a file, by tensors that share memory


def check_size(opened: BufferedReader) -> None:
    """Refuse a file that half of this machine's memory cannot hold, such as a sparse one.

    Raises:
        ValueError: says how large it is.
    """
    size = os.fstat(opened.fileno()).st_size
    if size > memory_limit():
        raise ValueError(
            f"it has {size / 2**30:.0f} GiB, wanted at most half of this machine's memory, "
            f"{memory_limit() / 2**30:.0f} GiB"
        )


def memory_limit() -> int:
    """Return the bytes that a received file may take: half of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def load_tensors(opened: BufferedReader) -> Any:
    """Read a file of ``torch.save``: plain tensors on the CPU, numbers and texts, in containers.

    Raises:
        ValueError: too large, compressed, or with tensors that are larger than the file.
        Exception: of the kinds that ``torch.load`` raises, where it is no such file.
    """
    check_size(opened)
    size = os.fstat(opened.fileno()).st_size
    opened.seek(0)
    if zipfile.is_zipfile(opened):
        _check_archive(opened, size)
    opened.seek(0)
    content = torch.load(opened, map_location="cpu", weights_only=True)
    _check_tensors(content, size)
    return content


def _check_archive(opened: BufferedReader, size: int) -> None:
    """Refuse an archive that unpacks to more than it holds."""
    with zipfile.ZipFile(opened) as archive:
        members = archive.infolist()
    if any(own.compress_type != zipfile.ZIP_STORED for own in members):
        raise ValueError("it is compressed, wanted an archive as torch.save writes it")
    if sum(own.file_size for own in members) > size:
        raise ValueError("its parts are larger than the file")


def _check_tensors(content: Any, size: int) -> None:
    """Refuse tensors that are not plain, or larger than the memory that they were given."""
    total = 0
    for tensor in _tensors(content):
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ValueError("it holds a tensor that is not a plain one")
        own = tensor.numel() * tensor.element_size()
        total += own
        if own > tensor.untyped_storage().nbytes() or total > _MOST_COPIES * size:
            raise ValueError(
                f"it states a tensor of shape {tuple(tensor.shape)}, more values than it holds"
            )


def _tensors(content: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested containers, which may contain themselves."""
    waiting, seen = [content], set[int]()
    while waiting:
        own = waiting.pop()
        if isinstance(own, Tensor):
            yield own
        elif isinstance(own, Mapping | list | tuple | set) and id(own) not in seen:
            seen.add(id(own))
            waiting += own.values() if isinstance(own, Mapping) else own
