"""A file of tensors costs what it holds, whatever it states."""

from __future__ import annotations

import collections
import hashlib
import io
import json
import os
import pickle
import zipfile

import pytest
import torch

from mics_fast.common.errors import InputError
from mics_fast.common.tensors import load_tensors
from mics_fast.engine.checkpoint import DamagedCheckpoint, load_checkpoint
from mics_fast.models.initial_weights import MOST_NAMES, load_initial_weights
from mics_fast.models.vit import VisionTransformer

NAME = "patch_embed.proj.weight"
HELD = 64  # bytes


class StatedStorage:
    def __init__(self, numel):
        self.numel = numel


class StatedTensor:
    """Pickles as a tensor of any shape on a storage of any size."""

    def __init__(self, numel, shape, stride):
        self.numel, self.shape, self.stride = numel, shape, stride

    def __reduce__(self):
        storage = StatedStorage(self.numel)
        arguments = (storage, 0, self.shape, self.stride, False, collections.OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class Forger(pickle.Pickler):
    def persistent_id(self, obj):
        if isinstance(obj, StatedStorage):
            return ("storage", torch.FloatStorage, "0", "cpu", obj.numel)
        return None


def forge(file, content, held=bytes(HELD), compression=zipfile.ZIP_STORED):
    """An archive as torch.save writes it, with one storage."""
    stream = io.BytesIO()
    Forger(stream, 2).dump(content)
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", held)
    return file


def larger_than_its_memory(file):
    return forge(file, {"model": {NAME: StatedTensor(10**7, (10**7,), (1,))}})


def of_a_terabyte(file):
    return forge(file, {"model": {NAME: StatedTensor(10**12, (10**12,), (1,))}})


def of_stride_zero(file):
    return forge(file, {"model": {NAME: StatedTensor(16, (10**6, 10**6), (0, 0))}})


def many_of_the_same_memory(file):
    each = {f"{k}.{NAME}": StatedTensor(1 << 18, (1 << 18,), (1,)) for k in range(100)}
    return forge(file, {"model": each}, held=bytes(1 << 20))


def compressed(file):
    tensor = StatedTensor(1 << 20, (1 << 20,), (1,))
    return forge(file, {NAME: tensor}, bytes(1 << 22), zipfile.ZIP_DEFLATED)


def overlapping(file):
    """Two names of the same bytes of the archive."""
    forge(file, {NAME: StatedTensor(1 << 18, (1 << 18,), (1,))}, bytes(1 << 20))
    with zipfile.ZipFile(file, "a") as archive:
        again = zipfile.ZipInfo("archive/data/1")
        whole = archive.getinfo("archive/data/0")
        for field in ("header_offset", "file_size", "compress_size", "CRC"):
            setattr(again, field, getattr(whole, field))
        archive.filelist.append(again)
        archive.NameToInfo[again.filename] = again
        archive._didModify = True
    return file


def sparse(file):
    with open(file, "wb") as made:
        made.write(b"PK\3\4")
        os.ftruncate(made.fileno(), 1 << 40)
    return file


def without_memory(file):
    torch.save({NAME: torch.empty(10**7, 10**7, device="meta")}, file)
    return file


def not_strided(file):
    torch.save({NAME: torch.eye(3).to_sparse()}, file)
    return file


HOSTILE = [
    larger_than_its_memory, of_a_terabyte, of_stride_zero, many_of_the_same_memory, compressed,
    overlapping, sparse, without_memory, not_strided,
]  # fmt: skip


def test_a_forged_file_that_tells_the_truth_is_read(tmp_path):
    file = forge(tmp_path / "state.pt", {"a": StatedTensor(16, (4, 4), (4, 1))})
    with open(file, "rb") as opened:
        assert torch.equal(load_tensors(opened)["a"], torch.zeros(4, 4))


@pytest.mark.parametrize("make", HOSTILE)
def test_a_checkpoint_that_states_more_than_it_holds_is_one_sentence(tmp_path, make):
    file = make(tmp_path / "state.pt")
    checksum = hashlib.sha256(file.read_bytes()).hexdigest() if make is not sparse else "0"
    (tmp_path / "meta.json").write_text(json.dumps({"sha256": checksum}))
    with pytest.raises(DamagedCheckpoint, match=r"state\.pt cannot be read: ") as error:
        load_checkpoint(tmp_path, {})
    assert "checksum" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("make", HOSTILE)
def test_weights_that_state_more_than_they_hold_are_one_sentence(tmp_path, make):
    file = make(tmp_path / "vit.pth")
    with pytest.raises(InputError, match=r"model\.init .*vit\.pth cannot be read: ") as error:
        load_initial_weights(file, [VisionTransformer(16, 8, 8, 1, 1)])
    assert "\n" not in str(error.value)


def test_names_that_multiply_are_one_sentence(tmp_path):
    """Dictionaries that contain the same dictionary under many names."""
    names = {str(k): torch.zeros(1) for k in range(1000)}
    torch.save({str(k): names for k in range(1000)}, tmp_path / "vit.pth")
    with pytest.raises(InputError, match=f"holds more than {MOST_NAMES} names"):
        load_initial_weights(tmp_path / "vit.pth", [VisionTransformer(16, 8, 8, 1, 1)])


def test_a_content_that_contains_itself_is_read(tmp_path):
    content = {"a": torch.zeros(2)}
    content["self"] = [content]
    torch.save(content, tmp_path / "state.pt")
    with open(tmp_path / "state.pt", "rb") as opened:
        assert torch.equal(load_tensors(opened)["a"], torch.zeros(2))
