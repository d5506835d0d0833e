"""Near-duplicates: their definition, and the merging of their groups."""

from __future__ import annotations

import csv
import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from mics_fast.preparation.leaks import (
    MAX_DISTANCE,
    group_together,
    near_duplicates,
    perceptual_hash,
)


def hashes_of(images):
    return [{"wli": perceptual_hash(np.asarray(image))} for image in images]


def found_among(hashes):
    """The pairs among rows that all lie in different splits."""
    pairs, count = near_duplicates(hashes, [str(row) for row in range(len(hashes))])
    assert count == len(pairs)
    return pairs


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
    found = found_among(hashes_of([*frames, *changed]))
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
    found = found_among(rows)
    assert [(pair.first, pair.second, pair.distance) for pair in found] == [
        (0, 2, 5), (1, 3, 6), (1, 2, MAX_DISTANCE - 5), (0, 1, MAX_DISTANCE),
    ]  # fmt: skip


def test_rows_are_compared_within_a_modality_alone():
    bits = np.random.default_rng(0).random(255) < 0.5
    assert found_among([{"wli": bits}, {"nbi": bits}, {}]) == []
    (pair,) = found_among([{"wli": bits}, {"nbi": bits}, {"wli": ~bits, "nbi": bits}])
    assert (pair.first, pair.second, pair.modality) == (1, 2, "nbi")


def test_blocks_of_rows_are_compared_with_each_other(monkeypatch):
    monkeypatch.setattr("mics_fast.preparation.leaks._BLOCK", 3)
    bits = np.random.default_rng(0).random((8, 255)) < 0.5
    bits[7] = bits[1]
    bits[5] = bits[4]
    found = found_among([{"wli": own} for own in bits])
    assert [(pair.first, pair.second) for pair in found] == [(1, 7), (4, 5)]


def test_groups_are_united_through_any_chain():
    bits = np.random.default_rng(0).random((8, 255)) < 0.5
    bits[5], bits[6] = bits[4], bits[2]
    bits[4, :20] = ~bits[4, :20]
    bits[2, :20] = ~bits[2, :20]
    bits[2, 20:] = bits[5, 20:]
    bits[2, :20] = bits[5, :20]
    groups = ["g", "", "", "h", "g", "", "", ""]
    hashes = [{"wli": own} for own in bits]
    united = group_together(groups, list("abcdefgh"), hashes)
    assert united == ["like a", "", "like a", "h", "like a", "like a", "", ""]
    assert group_together(groups[3:4], ["d"], hashes[3:4]) == ["h"]


def test_only_pairs_of_different_splits_are_counted():
    bits = np.random.default_rng(0).random(255) < 0.5
    rows = [{"wli": bits}] * 5
    pairs, count = near_duplicates(rows, ["train", "train", "test", "val", "train"])
    assert count == len(pairs) == 7
    assert all((pair.first, pair.second) != (0, 1) for pair in pairs)


def test_of_many_near_duplicates_the_closest_are_listed_and_all_are_counted(monkeypatch):
    monkeypatch.setattr("mics_fast.preparation.leaks._MOST", 10)
    monkeypatch.setattr("mics_fast.preparation.leaks._BLOCK", 16)
    bits = np.tile(np.random.default_rng(0).random(255) < 0.5, (60, 1))
    for row in range(60):
        bits[row, : row // 4] = ~bits[row, : row // 4]
    splits = ["train" if row % 2 else "test" for row in range(60)]
    rows = [{"wli": own} for own in bits]
    pairs, count = near_duplicates(rows, splits)
    assert count == 30 * 30 and len(pairs) == 10
    distances = [(bits[i] != bits[j]).sum() for i in range(60) for j in range(i) if (i + j) % 2]
    assert [pair.distance for pair in pairs] == sorted(distances)[:10]


def test_ten_thousand_frames_that_look_alike_take_little_memory():
    bits = np.random.default_rng(0).random(255) < 0.5
    rows = [{"wli": bits}] * 10_000
    splits = ["train", "test"] * 5_000
    tracemalloc.start()
    _, count = near_duplicates(rows, splits)
    group_together([""] * 10_000, [str(row) for row in range(10_000)], rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 25_000_000 and peak < 500e6
