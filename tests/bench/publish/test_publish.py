"""Tables of the documents, from results made up here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench.publish import __main__ as tables
from bench.publish import reports, results, summaries
from bench.publish.plots import plots, stale_plots

MACHINE = {
    "device": "AMD EPYC", "kind": "cpu", "threads": 2, "torch": "2.13.0", "commit": "abc1234",
    "date": "2026-01-02T0304", "mode": "full", "cuda": None, "gpu": "",
}  # fmt: skip
PEAKS = {
    "2": {
        "bytes": 2e10,
        "matrix_flops": 5e11,
        "vector_flops": 5e11,
        "source": "measured",
        "reached": False,
    }
}


def row(implementation: str, median: float, ours: bool = False, **others: Any) -> dict[str, Any]:
    return {
        "subject": "consistency", "operator": "multimodal_consistency_loss", "shape": "B = 8",
        "batch": 8, "threads": 2, "implementation": implementation, "ours": ours,
        "median_ms": median, "p20_ms": median, "p80_ms": median, "min_ms": median,
        "cpu_ms": 2 * median, "ratio": median / 4.0, "floor_ms": 2.0,
        "share_of_floor": 2.0 / median, "extra_mb": 10 * median, "bytes": 4000000, "flops": 10**9,
        "bandwidth": 2e10,
        **others,
    }  # fmt: skip


ROWS = [
    row("cpu", 4.0, ours=True),
    row("ALBEF eager", 50.0),
    row("ALBEF compiled", 3.0),
]
ROWS += [
    {
        "subject": "consistency", "operator": "consistency_loss", "shape": "B = 8, alpha = 0",
        "batch": 8, "threads": 2, "bytes": 1, "flops": 1,
        "implementation": name, "absent": "needs a GPU",
    }
    for name in ("Liger-Kernel", "Inf-CL")
]  # fmt: skip


def store(folder: Path, name: str = "2026.json", **machine: Any) -> None:
    """A result on disk."""
    path = folder / "some-device" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine": MACHINE | machine, "peaks": PEAKS, "rows": ROWS}
    path.write_text(json.dumps(found))


def test_the_table_of_feature_mode_names_the_sizes_without_the_wanted_gain() -> None:
    steps = {"reference losses": 10.0, "reference losses, compiled": 7.0, "fused operators": 4.0,
             "fused operators, compiled": 2.0}  # fmt: skip
    rows = [
        row(name, median, ours=median <= 4, subject="features", operator="features",
            shape="8 classes, batch 64", ratio=median / 4)
        for name, median in steps.items()
    ]  # fmt: skip
    text = summaries.features([results.Result(Path(), MACHINE, {}, rows)])
    assert text == (
        "`python -m bench --full --only features` on 2 threads of an AMD EPYC, torch 2.13.0, "
        "commit abc1234, 2026-01-02:\n\n"
        "| classes, batch | fused operators | steps/s | reference losses "
        "| compiled: fused operators | steps/s | reference losses |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| 8 classes, batch 64 | 4 ms | 250 | 2.5x | 2 ms | 500 | 3.5x |\n\n"
        "Below 3x, uncompiled: 8 classes, batch 64 (2.5x). "
        "Not measured on a GPU.\n"
    )


def test_a_table_holds_times_ratios_memory_command_and_the_cases_we_lose(tmp_path: Path) -> None:
    store(tmp_path)
    text = summaries.consistency(results.stored(tmp_path))
    assert text == (
        "`python -m bench --full --only consistency` on 2 threads of an AMD EPYC, torch 2.13.0, "
        "commit abc1234, 2026-01-02:\n\n"
        "| B | C++ | of the floor | ALBEF | compiled | chunked | attention |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| 8 | 4 ms | 50 % | 12.5x | 0.8x | - | - |\n"
        "| | 40 MB | | 500 MB | 30 MB | - | - |\n\n"
        "Faster than ours: ALBEF compiled for `multimodal_consistency_loss` at B = 8 (0.8x). "
        "Not measured on a GPU.\n"
    )


def test_what_was_not_measured_says_so_and_why(tmp_path: Path) -> None:
    store(tmp_path)
    text = reports.everything("consistency", results.stored(tmp_path))
    assert text is not None
    assert (
        "Not measured: Liger-Kernel and Inf-CL for `consistency_loss` at B = 8, alpha = 0 "
        "(needs a GPU)." in text
    )
    assert "Not measured on a GPU." in text
    promised = reports.targets(results.stored(tmp_path))
    assert promised is not None
    assert "| ALBEF eager at least 12x | 12.5x | met |" in promised
    assert "| ALBEF compiled at least 3x | 0.75x | missed |" in promised
    assert re.search(r"Not measured: \d+ on a CPU and \d+ on a GPU\.", promised)


def test_every_table_can_be_written(tmp_path: Path) -> None:
    store(tmp_path)
    for name in ("work", "all consistency", "plots"):
        assert tables.BLOCKS[name](results.stored(tmp_path)), name


def test_only_what_stands_between_marks_is_replaced_and_only_where_results_are(
    tmp_path: Path,
) -> None:
    text = (
        "before\n<!-- bench: consistency -->\nold\n<!-- bench: end -->\nbetween\n"
        "<!-- bench: shift -->\nkept\n<!-- bench: end -->\nafter\n"
    )
    store(tmp_path)
    new = tables.filled(text, results.stored(tmp_path))
    assert new.startswith("before\n<!-- bench: consistency -->\n`python")
    assert "old" not in new
    assert new.endswith("between\n<!-- bench: shift -->\nkept\n<!-- bench: end -->\nafter\n")
    assert tables.filled(new, results.stored(tmp_path)) == new


def test_an_unknown_table_is_named() -> None:
    with pytest.raises(SystemExit, match="'speed'"):
        tables.filled("<!-- bench: speed -->\n<!-- bench: end -->", [])


def test_the_newest_full_run_of_a_device_counts(tmp_path: Path) -> None:
    store(tmp_path, "1.json", date="2026-01-01T0000", commit="older")
    store(tmp_path, "2.json", date="2026-02-01T0000", commit="newer")
    store(tmp_path, "3-quick.json", date="2026-03-01T0000", commit="quick")
    text = summaries.consistency(results.stored(tmp_path))
    assert text is not None and "newer" in text and "quick" not in text


def test_a_plot_that_is_missing_or_of_another_run_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path / "results")
    monkeypatch.setattr("bench.publish.plots.FOLDER", tmp_path)
    monkeypatch.setattr("bench.publish.plots.ROOT", tmp_path)
    found = results.stored(tmp_path / "results")
    wanted = [one.path.name for one in plots(found)]
    assert wanted == ["time-amd-epyc.svg", "memory-amd-epyc.svg", "floor-amd-epyc.svg"]
    for name in wanted:
        (tmp_path / name).write_text("from 2026.json")
    assert stale_plots(found) == []
    (tmp_path / wanted[0]).write_text("from 2025.json")
    assert stale_plots(found) == [wanted[0]]


def test_the_documents_are_what_the_stored_results_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["publish", "--check"])
    assert tables.main() == 0, capsys.readouterr().out
