"""Floors and bytes of the image pipeline's rows, on rounds made up here."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from bench import pipeline
from bench.pipeline import PillowPairs, Round
from bench.publish import results, summaries
from bench.roofline import Peaks
from mics_fast.data.manifest import Row

pytestmark = pytest.mark.usefixtures("set_threads")  # which gives torch its number back
CPU = torch.device("cpu")
SECONDS = {
    "DALI": 0.010, "DALI, host cache": 0.002, "Pillow": 0.012, "Pillow, draft mode": 0.008,
    "decoding alone, DALI": 0.006, "decoding alone, Pillow": 0.009,
    "decoding alone, draft mode": 0.004,
}  # fmt: skip


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """Four pairs of JPEG files."""
    generator = np.random.default_rng(0)
    found = []
    for index in range(4):
        files: dict[str, Path | None] = {}
        for name in ("wli", "nbi"):
            file = files[name] = tmp_path / f"{index}-{name}.jpg"
            pixels = generator.integers(0, 255, (96, 128, 3), np.uint8)
            Image.fromarray(pixels).save(file)
        found.append(Row(index, str(index), 0, True, index, "train", (), files))
    return found


class InThisProcess:
    """A pool of one process that starts none."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def submit(self, function: Any, rows: Any, names: Any, device: str, name: str) -> Future[Round]:
        future: Future[Round] = Future()
        future.set_result(Round(SECONDS[name], 0.02, 2.0, 50.0))
        return future


@pytest.fixture
def table(rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The rows of a run, by implementation."""
    monkeypatch.setattr(pipeline, "ProcessPoolExecutor", InThisProcess)
    peaks = Peaks(1e9, 1.0, 1.0, "")
    monkeypatch.setattr(pipeline, "peaks_of", lambda device, footprint: peaks)
    found = pipeline.table(rows, ("wli", "nbi"), CPU, 2)
    return {str(row["implementation"]): row for row in found}


def test_the_floor_of_decoding_is_the_faster_decoder_alone(table: dict[str, Any]) -> None:
    assert set(table) == set(SECONDS)
    for name, floor in (("DALI", 6.0), ("Pillow", 6.0), ("Pillow, draft mode", 4.0)):
        assert table[name]["floor_ms"] == pytest.approx(floor)
        assert table[name]["share_of_floor"] == pytest.approx(floor / (1e3 * SECONDS[name]))
        assert table[name]["extra_mb"] == 50.0 and table[name]["p20_ms"] > 0
    assert table["decoding alone, DALI"]["share_of_floor"] is None


def test_the_floor_of_kept_frames_is_their_crops_and_views_over_the_bandwidth(
    table: dict[str, Any],
) -> None:
    row = table["DALI, host cache"]
    views, frames = 2 * 3 * 224 * 224 * 4, 2 * 3 * 256 * 256
    assert views < row["bytes"] < views + frames
    assert row["floor_ms"] == pytest.approx(1e3 * row["bytes"] / 1e9)


def test_bytes_of_what_is_decoded_are_files_and_views(
    table: dict[str, Any], rows: list[Row]
) -> None:
    files = sum(file.stat().st_size for row in rows for file in row.files.values() if file)
    assert table["DALI"]["bytes"] == round(files / 4) + 2 * 3 * 224 * 224 * 4


def test_decoding_alone_decodes_and_makes_no_view(
    rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[tuple[int, int]] = []
    load = ImageFile.ImageFile.load

    def loaded(image: ImageFile.ImageFile) -> Any:
        decoded.append(image.size)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", loaded)
    monkeypatch.setattr(Image.Image, "resize", None)
    whole = PillowPairs(rows, ("wli", "nbi"), 16, draft=False, alone=True)
    assert whole[3] == 3 and decoded == [(128, 96)] * 2
    decoded.clear()
    small = PillowPairs(rows, ("wli", "nbi"), 16, draft=True, alone=True)
    assert small[3] == 3 and max(decoded)[0] <= 64  # at half the size or less


class Busy(torch.utils.data.Dataset[float]):
    """Samples that each take 1 ms of CPU time, in a worker."""

    def __len__(self) -> int:
        return pipeline.BATCH * (1 + 2 * pipeline.WARM_UP + pipeline.BATCHES)

    def __getitem__(self, number: int) -> float:
        end = time.process_time() + 0.001
        while time.process_time() < end:
            pass
        return 0.0


def test_cpu_time_is_also_that_of_workers_that_still_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def start() -> Any:
        yield from torch.utils.data.DataLoader(Busy(), batch_size=pipeline.BATCH, num_workers=1)

    monkeypatch.setattr(pipeline, "check_dali", lambda: None)
    monkeypatch.setattr(
        pipeline, "loaders_of", lambda *arguments: {"busy": pipeline.Loader(start, "")}
    )
    found = pipeline.one_round([], (), "cpu", "busy")
    assert 0.0008 < found.cpu < 0.002


def test_the_readme_shows_floor_and_memory(table: dict[str, Any], tmp_path: Path) -> None:
    machine = {
        "device": "AMD EPYC", "kind": "cpu", "threads": 2, "torch": "2.13.0", "commit": "abc1234",
        "date": "2026-01-02T0304", "mode": "full", "cuda": None, "gpu": "",
    }  # fmt: skip
    found = [{"subject": "pipeline", **row} for row in table.values()]
    (tmp_path / "some").mkdir()
    stored = json.dumps({"machine": machine, "peaks": {}, "rows": found})
    (tmp_path / "some" / "1.json").write_text(stored)
    text = summaries.pipeline(results.stored(tmp_path))
    assert text is not None
    line = next(line for line in text.splitlines() if line.startswith("| DALI |"))
    assert line.split(" | ")[2:6] == ["1", "60 %", "20.0 ms", "50"]
    line = next(line for line in text.splitlines() if line.startswith("| decoding alone, DALI"))
    assert line.split(" | ")[3] == "-"
    for row in found:  # as they were stored when workers that still ran were not counted
        row["cpu_ms"] = row.pop("cpu_ms_per_pair")
    (tmp_path / "some" / "1.json").write_text(
        json.dumps({"machine": machine, "peaks": {}, "rows": found})
    )
    text = summaries.pipeline(results.stored(tmp_path))
    assert text is not None and "CPU time" not in text
