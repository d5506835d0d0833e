"""The experiment command: a grid of runs that share what they can and survive being killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from mics_fast import experiment
from mics_fast.common.errors import InputError
from mics_fast.data.manifest import read_manifest
from mics_fast.options.commands import parse_experiment
from mics_fast.study.experiment import Labels, draw_labels, make_cells, pretraining_folder


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use as many threads as a worker, because another number may round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def options(phantom_manifest, few_steps):
    return [
        *few_steps, "--data.manifest", str(phantom_manifest), "--experiment.seeds", "[0, 1]",
        "--experiment.label_fractions", "[0.5]",
        "--experiment.variants", "[supervised, pretraining]", "--checkpoint_every", "1",
        "--experiment.out_of_distribution", str(phantom_manifest),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("experiment") / "grid"
    experiment.main([*options, "--out", str(out)])
    return out


def without_seconds(out):
    rows = json.loads((out / "results.json").read_text())["rows"]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_one_table_compares_the_variants(finished):
    rows = without_seconds(finished)
    assert [(row["variant"], row["seeds"]) for row in rows] == [
        ("supervised", [0, 1]), ("pretraining", [0, 1])
    ]  # fmt: skip
    assert "minus_first" in rows[1] and set(rows[0]["views"]) >= {"fused", "wli", "without nbi"}
    for view in rows[0]["views"].values():
        # All rows of the same manifest, of which the test rows are a quarter.
        assert 0 < view["out_of_distribution_auroc"]["mean"] < 1
        assert view["risk_at_100_coverage"]["mean"] == pytest.approx(1 - view["accuracy"]["mean"])
    text = (finished / "results.md").read_text()
    assert "| 50.0% (12) | pretraining |" in text and "2 seeds" in text and "48 samples" in text


def test_variants_of_a_seed_share_labels_and_pre_training(finished):
    seed = finished / "seed-0"
    assert sorted(path.name for path in seed.iterdir()) == [
        "labels-0.5", "labels-0.5.csv", "pretraining"
    ]  # fmt: skip
    configs = {
        variant: yaml.safe_load((seed / "labels-0.5" / variant / "config.yaml").read_text())
        for variant in ("supervised", "pretraining")
    }
    assert configs["supervised"]["finetune"]["init"] == "none"
    assert configs["pretraining"]["finetune"]["init"] == str(seed / "pretraining")
    assert configs["supervised"]["data"] == configs["pretraining"]["data"]


def test_seeds_draw_other_labels_of_the_same_splits(finished, phantom_manifest):
    base = read_manifest(phantom_manifest)
    drawn = [read_manifest(finished / f"seed-{seed}" / "labels-0.5.csv") for seed in (0, 1)]
    for manifest in drawn:
        assert [(row.id, row.split, row.group, row.label) for row in manifest.rows] == [
            (row.id, row.split, row.group, row.label) for row in base.rows
        ]
        assert len(manifest.select("train", labelled=True)) == 12
        for row, original in zip(manifest.rows, base.rows, strict=True):
            assert row.files["wli"].samefile(original.files["wli"])
    labelled = [{row.id for row in manifest.select("train", True)} for manifest in drawn]
    assert labelled[0] != labelled[1]


def test_a_number_of_labels_per_class_is_drawn_as_a_fraction_is(phantom_manifest, tmp_path):
    manifest = read_manifest(phantom_manifest)
    files = tmp_path / "fraction.csv", tmp_path / "count.csv"
    for file, labels in zip(files, (Labels(0.5), Labels(count=2)), strict=True):
        draw_labels(manifest, file, labels, seed=3)
    # Half of four train rows of each class are two.
    assert files[0].read_text() == files[1].read_text()
    draw_labels(manifest, files[1], Labels(count=1), seed=3)
    few = read_manifest(files[1]).select("train", labelled=True)
    assert sorted(row.label for row in few) == list(range(6))


def test_labels_are_named_alike_in_folders_and_tables():
    assert (str(Labels(0.05)), Labels(0.05).file_name) == ("5.0%", "labels-0.05")
    assert (str(Labels(count=2)), Labels(count=2).file_name) == (
        "2 per class", "labels-2-per-class"
    )  # fmt: skip


def test_variants_share_a_pre_training_where_its_options_are_the_same(options, tmp_path):
    names = ["full", "fixmatch", "without-adversary", "reconstruction", "without-pretraining"]
    asked = ["--experiment.variants", f"[{', '.join(names)}]", "--out", str(tmp_path)]
    train, grid = parse_experiment([*options, *asked])
    cells = [cell for cell in make_cells(train, grid, tmp_path) if cell.seed == 1]
    folders = {c.variant: c.pretraining and Path(c.pretraining.out).name for c in cells}
    assert folders == {
        "full": "pretraining", "fixmatch": "pretraining",
        "without-adversary": "pretraining-without-adversarial",
        "reconstruction": "pretraining-without-consistency-adversarial",
        "without-pretraining": None,
    }  # fmt: skip
    for cell in cells:
        init = pretraining_folder(tmp_path, 1, cell.variant) if cell.pretraining else "none"
        assert cell.config.finetune.init == str(init)


def test_a_killed_experiment_goes_on_as_if_it_had_never_stopped(finished, options, tmp_path):
    """Two workers are killed half way; the uninterrupted study ran in one process."""
    out = tmp_path / "grid"
    arguments = [*options, "--experiment.processes", "2", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "mics_fast.experiment", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 240
    while not list(out.glob("seed-?/pretraining/checkpoints/*/step-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    workers = children(process.pid)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (out / "results.json").exists()
    # Workers that lived on would write into the folders that the next call goes on with.
    assert len(workers) == 2
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    experiment.main(arguments)
    assert without_seconds(out) == without_seconds(finished)


def children(parent):
    """List the child processes of a process, except Python's resource tracker."""
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [n for n in found if "spawn_main" in Path(f"/proc/{n}/cmdline").read_text()]


def is_running(number):
    try:
        return " Z " not in Path(f"/proc/{number}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_is_finished_is_not_run_again(finished, options, monkeypatch):
    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr("mics_fast.engine.loop.Loop.run", refuse)
    results = sorted(finished.glob("seed-*/*/*/result.json"))
    written = [path.stat().st_mtime_ns for path in results]
    experiment.main([*options, "--out", str(finished)])
    assert [path.stat().st_mtime_ns for path in results] == written and len(written) == 4


@pytest.mark.parametrize("text", ["", "[]", "{", '{"other": ' + "[" * 9999, "cut short", None])
def test_a_damaged_result_is_one_sentence(finished, options, text):
    file = sorted(finished.rglob("result.json"))[0]
    whole = file.read_text()
    if text is None:  # whole, of another shape
        text = json.dumps({**json.loads(whole), "views": []})
    file.write_text(text)
    try:
        with pytest.raises(InputError, match=r"result\.json") as error:
            experiment.main([*options, "--out", str(finished)])
    finally:
        file.write_text(whole)
    assert "\n" not in str(error.value)


def test_an_experiment_does_not_go_on_with_other_options(finished, options):
    with pytest.raises(InputError, match=r"option finetune\.lr is 0\.5, but the run in"):
        experiment.main([*options, "--out", str(finished), "--finetune.lr", "0.5"])


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("experiment.seeds", "[]", r"experiment\.seeds is \[\], wanted each value once"),
        ("experiment.seeds", "[1, 1]", r"experiment\.seeds is \[1, 1\], wanted each value once"),
        ("experiment.label_fractions", "[]", "label_fractions and .*label_counts are empty"),
        ("experiment.label_counts", "[0]", r"label_counts holds 0, wanted a number of at least 1"),
        (
            "experiment.label_fractions",
            "[2]",
            r"label_fractions holds 2\.0, wanted a number above 0",
        ),
        ("experiment.variants", "[magic]", "magic"),
        ("experiment.processes", "0", r"experiment\.processes is 0, wanted a number above 0"),
        ("experiment.out_of_distribution", "no.csv", r"manifest .*no\.csv cannot be read"),
        ("data.manifest", "", "option --data.manifest is missing"),
    ],
)
def test_a_bad_option_is_one_sentence(options, tmp_path, option, value, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        experiment.main([*options, "--out", str(tmp_path), f"--{option}", value])
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_written_is_named(options, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        experiment.main([*options, "--out", str(tmp_path / "file" / "grid")])


def test_the_study_compares_last_weights_over_five_seeds():
    configs = Path(__file__).parents[3] / "configs"
    files = [f"--config={configs / name}" for name in ("demo.yaml", "study.yaml")]
    train, grid = parse_experiment([*files, "--data.manifest", "x", "--out", "y"])
    assert (len(grid.seeds), grid.label_counts) == (5, [2, 8])
    assert grid.variants == ["supervised", "supervised-long", "pretraining", "full"]
    assert train.finetune.select == "last" and train.finetune.steps and train.pretrain.steps


def test_another_manifest_to_be_unsure_of_needs_no_training(
    finished, options, phantom_manifest, monkeypatch
):
    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr("mics_fast.engine.loop.Loop.run", refuse)
    other = phantom_manifest.with_name("eleven.csv")
    other.write_text("".join(phantom_manifest.read_text().splitlines(keepends=True)[:12]))
    asked = ["--experiment.out_of_distribution", str(other)]
    experiment.main([*options, "--out", str(finished), *asked])
    assert {row["n_other"] for row in without_seconds(finished)} == {11}
    experiment.main([*options, "--out", str(finished)])  # as the other tests know it
    assert {row["n_other"] for row in without_seconds(finished)} == {48}
