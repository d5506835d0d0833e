"""Near-duplicates: what counts as one, and that nobody is left out when groups are united."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from mics_fast.preparation.leaks import (
    MAX_DISTANCE,
    NearDuplicate,
    group_together,
    near_duplicates,
    perceptual_hash,
)


def hashes_of(images):
    return [{"wli": perceptual_hash(np.asarray(image))} for image in images]


@pytest.fixture(scope="module")
def frames(kvasir_seg):
    """Forty Kvasir-SEG frames of different groups."""
    with open(kvasir_seg / "labels.csv", newline="") as file:
        files = {record["group"]: record["file"] for record in csv.DictReader(file)}
    return [Image.open(kvasir_seg / name).convert("RGB") for name in list(files.values())[::22]]


def recompressed(image):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=40)
    return Image.open(stream)


COPIES = {
    "at half size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "at JPEG quality 40": recompressed,
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_frame_is_found_and_nothing_else(frames, how):
    changed = [COPIES[how](image) for image in frames]
    found = near_duplicates(hashes_of([*frames, *changed]))
    count = len(frames)
    assert {(pair.first, pair.second) for pair in found} == {(k, k + count) for k in range(count)}
    assert max(pair.distance for pair in found) <= 22


def test_distances_are_counted_in_bits_and_sorted():
    bits = np.random.default_rng(0).random(255) < 0.5
    rows = []
    for flipped in (0, MAX_DISTANCE, 5, MAX_DISTANCE + 5 + 1):
        changed = bits.copy()
        changed[:flipped] = ~changed[:flipped]
        rows.append({"nbi": changed})
    found = near_duplicates(rows)
    assert [(pair.first, pair.second, pair.distance) for pair in found] == [
        (0, 2, 5), (1, 3, 6), (1, 2, MAX_DISTANCE - 5), (0, 1, MAX_DISTANCE),
    ]  # fmt: skip


def test_rows_are_compared_within_a_modality_alone():
    bits = np.random.default_rng(0).random(255) < 0.5
    assert near_duplicates([{"wli": bits}, {"nbi": bits}, {}]) == []
    (pair,) = near_duplicates([{"wli": bits}, {"nbi": bits}, {"wli": ~bits, "nbi": bits}])
    assert (pair.first, pair.second, pair.modality) == (1, 2, "nbi")


def test_blocks_of_rows_are_compared_with_each_other(monkeypatch):
    monkeypatch.setattr("mics_fast.preparation.leaks._BLOCK", 3)
    bits = np.random.default_rng(0).random((8, 255)) < 0.5
    bits[7] = bits[1]
    bits[5] = bits[4]
    found = near_duplicates([{"wli": own} for own in bits])
    assert [(pair.first, pair.second) for pair in found] == [(1, 7), (4, 5)]


def test_groups_are_united_through_any_chain():
    def pair(a, b):
        return NearDuplicate(a, b, "wli", 0)

    groups = ["g", "", "", "h", "g", "", ""]
    ids = list("abcdefg")
    united = group_together(groups, ids, [pair(4, 5), pair(2, 5)])
    assert united == ["like a", "", "like a", "h", "like a", "like a", ""]
    assert group_together(groups, ids, []) == groups
