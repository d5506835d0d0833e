"""Sources of the weights that ``model.init`` names: a file, a folder, or the Hugging Face hub.

The hub is asked through ``huggingface_hub``, which keeps files in its cache and reads the
environment: HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mics_fast.common.errors import InputError
from mics_fast.common.files import read_json

HUB = "hf-hub:"
CONFIG = "config.json"
FILES = ("model.safetensors", "pytorch_model.bin")
_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Weights:
    """Weights on this machine.

    Args:
        name: ``model.init`` that finds the same weights again; of the hub, with the commit.
        file: of tensors.
        config: content of the ``config.json`` beside them; empty: there is none.
    """

    name: str
    file: Path
    config: Mapping[str, Any] = field(default_factory=dict)


def find_weights(init: str) -> Weights:
    """Find, and if necessary download, what ``model.init`` names.

    Args:
        init: a file, a folder of ``config.json`` and ``model.safetensors`` (or
            ``pytorch_model.bin``), or ``hf-hub:OWNER/NAME[@REVISION]`` of the same two files.

    Raises:
        InputError: there are none; says what was looked for, and what to do.
    """
    if init.startswith(HUB):
        return _of_hub(init)
    path = Path(init).absolute()
    if not path.is_dir():
        return Weights(str(path), path)
    found = [path / name for name in FILES if (path / name).exists()]
    if not found:
        raise InputError(f"model.init {path} holds neither {' nor '.join(FILES)}")
    config = path / CONFIG
    return Weights(str(path), found[0], _read_config(config) if config.exists() else {})


def _of_hub(init: str) -> Weights:
    match = _NAME.fullmatch(init.removeprefix(HUB))
    if match is None:
        raise InputError(f"model.init is {init}, wanted {HUB}OWNER/NAME or with @REVISION")
    repository, revision = match["repository"], match["revision"]
    config = _download(repository, CONFIG, revision)
    assert config is not None
    commit = config.parent.name  # the cache keeps a folder per commit
    file = _download(repository, FILES[0], commit, may_lack=True)
    file = file or _download(repository, FILES[1], commit)
    assert file is not None
    return Weights(f"{HUB}{repository}@{commit}", file, _read_config(config))


def _download(
    repository: str, name: str, revision: str | None, *, may_lack: bool = False
) -> Path | None:
    """Download a file of a repository into the cache; return None if it is lacking and may be.

    Raises:
        InputError: no such repository, revision or file, or no way to get it.
    """
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError:
        raise InputError(
            f"model.init {HUB}{repository} needs huggingface_hub, wanted: "
            "pip install 'mics-fast[hub]'"
        ) from None
    at = f" at revision {revision}" if revision else ""
    wanted = f"model.init: {name} of {repository}{at} on the Hugging Face hub"
    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except errors.LocalEntryNotFoundError:
        raise InputError(
            f"{wanted} is not in the cache, and the hub is offline (HF_HUB_OFFLINE) or cannot be "
            "reached: download it where there is a network (hf download "
            f"{repository} {CONFIG} {FILES[0]}) and copy the cache (HF_HOME), or give a folder "
            "with both files"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{wanted} cannot be had: there is no such revision") from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{wanted} cannot be had: there is no such repository, or it is private and HF_TOKEN "
            "does not open it"
        ) from None
    except errors.EntryNotFoundError:
        if may_lack:
            return None
        raise InputError(
            f"{wanted} cannot be had: the repository has no such file, wanted one in timm's format"
        ) from None
    except (OSError, ValueError) as error:  # no disk space, a server's error, a bad name
        raise InputError(f"{wanted} cannot be had: {' '.join(str(error).split())}") from None


def _read_config(file: Path) -> Mapping[str, Any]:
    """Read a ``config.json``.

    Raises:
        InputError: it is no JSON object.
    """
    config = read_json(file)
    if not isinstance(config, dict):
        raise InputError(f"{file} is no JSON object")
    return config
