"""Locks that let one process at a time use a folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from mics_fast.common.errors import InputError

_held: dict[Path, int] = {}


def lock_folder(folder: Path) -> None:
    """Lock a folder for this process until the process ends.

    The lock is an OS lock on the file ``.lock``: it is released when the process dies, and a
    left-over file locks nothing. A process may lock the same folder again.

    Raises:
        InputError: another process holds the lock, or the lock file cannot be written.
    """
    file = folder.resolve() / ".lock"
    held = _held.get(file)
    if held is not None and file.exists() and os.path.samestat(os.fstat(held), file.stat()):
        return
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(file, flags, 0o600)
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(
            f"{folder} is in use by another process that trains there; wait for it, or name "
            "another --out"
        ) from None
    except OSError as error:  # a file system without locks
        os.close(descriptor)
        raise InputError(f"{file} cannot be locked: {error.strerror}") from None
    _held[file] = descriptor
