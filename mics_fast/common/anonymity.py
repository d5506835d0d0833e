"""Pseudonyms: names hashed with a secret key; only the key's holder can link them to names."""

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
    """Read the key in a file; create the file with a random key if it does not exist.

    A new key file is readable by its owner only.

    Raises:
        InputError: the file cannot be read or created, or its key is too short.
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
    """Replace a name by 16 hexadecimal digits; the same key and name give the same digits.

    Examples:
        >>> len(pseudonym(b"a key of 16 bytes", "DOE_JOHN"))
        16
    """
    return hmac.new(key, name.encode(), hashlib.sha256).hexdigest()[:16]
