"""Pseudonyms: names hashed with a key, so that only who holds the key can tell whose they are."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from mics_fast.common.errors import InputError
from mics_fast.common.files import read_small

_LEAST, _MOST = 16, 4096  # characters of a key


def read_key(file: Path) -> bytes:
    """The key in a file; a file that is not there is made, with a random key, for its owner alone.

    Raises:
        InputError: the file cannot be read or made, or holds too short a key.
    """
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        pass
    except OSError as error:
        raise InputError(f"key file {file} cannot be written: {error.strerror}") from None
    else:
        with open(descriptor, "w") as made:
            made.write(secrets.token_hex(32) + "\n")
    key = read_small(file, _MOST).strip().encode()
    if len(key) < _LEAST:
        raise InputError(f"key file {file} holds {len(key)} characters, wanted at least {_LEAST}")
    return key


def pseudonym(key: bytes, name: str) -> str:
    """16 hexadecimal digits in the place of a name: the same for the same key and name.

    Example:
        >>> len(pseudonym(b"a key of 16 bytes", "DOE_JOHN"))
        16
    """
    return hmac.new(key, name.encode(), hashlib.sha256).hexdigest()[:16]
