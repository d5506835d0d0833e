"""The data options of the trainer, through its command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from mics_fast import evaluate, prepare, train
from mics_fast.common.errors import InputError
from mics_fast.engine.checkpoint import Checkpoints

CONFIG = str(Path(__file__).parents[3] / "configs" / "demo.yaml")
SHORT = [
    "--config", CONFIG, "--log_every", "1", "--checkpoint_every", "2", "--keep_checkpoints", "9",
    "--pretrain.batch_size", "8", "--pretrain.epochs", "2",
    "--pretrain.steps", "null", "--finetune.steps", "null",
    "--pretrain.adversarial_weight", "0.1", "--pretrain.consistency_weight", "1",  # off in the demo
    "--finetune.labelled_batch", "6", "--finetune.unlabelled_batch", "8", "--finetune.epochs", "1",
]  # fmt: skip


@pytest.fixture
def manifest(tmp_path):
    """A phantom of 24 pairs without val rows."""
    prepare.main(
        ["phantom", "--out", str(tmp_path / "data"), "--pairs", "24", "--split", "0.7", "0", "0.3"]
    )
    return tmp_path / "data" / "manifest.csv"


def weights(run, stage="pretrain", step=None):
    checkpoints = Checkpoints(run / "checkpoints" / stage)
    path = checkpoints.latest() if step is None else checkpoints.folder / f"step-{step:08d}"
    return torch.load(path / "state.pt", weights_only=True)["stage"]


def test_a_run_from_kept_frames_goes_on_as_if_it_had_never_stopped(manifest, tmp_path):
    arguments = [*SHORT, "--data.manifest", str(manifest), "--stage", "pretrain",
                 "--data.cache.mode", "host"]  # fmt: skip
    train.main([*arguments, "--out", str(tmp_path / "whole")])
    train.main([*arguments, "--out", str(tmp_path / "stopped")])
    for step in (3, 4):  # as if it had been killed after step 2
        folder = tmp_path / "stopped" / "checkpoints" / "pretrain" / f"step-{step:08d}"
        if folder.exists():
            folder.rename(tmp_path / f"gone-{step}")
    train.main([*arguments, "--out", str(tmp_path / "stopped"), "--resume"])
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def broken(manifest):
    """Cut the NBI frame of a train row short, and remove both frames of a test row."""
    with open(manifest, newline="") as file:
        records = list(csv.DictReader(file))
    cut = next(record for record in records if record["split"] == "train")
    gone = next(record for record in records if record["split"] == "test")
    path = manifest.parent / cut["nbi"]
    path.write_bytes(path.read_bytes()[:-200])
    for name in ("wli", "nbi"):
        (manifest.parent / gone[name]).unlink()
    return path


def evaluated(run):
    """Return the JSON that ``evaluate`` writes for a run."""
    file = run / "metrics.json"
    evaluate.main([str(run), "--json", str(file), "--resamples", "5"])
    return json.loads(file.read_text())


def test_a_run_that_skips_bad_files_trains_both_stages_and_is_evaluated(manifest, tmp_path, capfd):
    cut = broken(manifest)
    run = tmp_path / "run"
    arguments = [*SHORT, "--data.manifest", str(manifest), "--out", str(run)]
    with pytest.raises(InputError, match="does not exist"):
        train.main(arguments)
    train.main([*arguments, "--data.on_bad_file", "skip"])
    told = capfd.readouterr().err
    assert (
        f"skipped: {cut} cannot be decoded" in told
        and "rows: skipped 1 images of 1 bad files" in told
    )
    assert all(value.isfinite().all() for value in weights(run, "finetune").values())
    result = evaluated(run)
    with open(manifest, newline="") as file:
        tested = sum(record["split"] == "test" for record in csv.DictReader(file))
    assert result["n"] == tested - 1


def test_a_run_that_stopped_at_a_bad_file_goes_on_by_skipping_it(manifest, tmp_path):
    cut = broken(manifest)
    arguments = [*SHORT, "--data.manifest", str(manifest), "--out", str(tmp_path / "run"),
                 "--stage", "pretrain"]  # fmt: skip
    rows = manifest.read_text().splitlines()
    manifest.write_text("\n".join(row for row in rows if ",test," not in row) + "\n")
    with pytest.raises(InputError, match=cut.name):
        train.main(arguments)
    train.main([*arguments, "--resume", "--data.on_bad_file", "skip"])
    assert Checkpoints(tmp_path / "run" / "checkpoints" / "pretrain").latest()


def test_a_run_reads_shards(tmp_path):
    prepare.main(["phantom", "--out", str(tmp_path / "data"), "--pairs", "24", "--to-shards", "5"])
    train.main(
        [*SHORT, "--data.manifest", str(tmp_path / "data" / "manifest.csv"),
         "--out", str(tmp_path / "run")]
    )  # fmt: skip
    assert evaluated(tmp_path / "run")["views"]["fused"]


def test_views_in_bf16_need_encoders_in_bf16(manifest, tmp_path):
    arguments = [*SHORT, "--data.manifest", str(manifest), "--out", str(tmp_path / "run"),
                 "--device", "cpu", "--precision", "fp32", "--data.dtype", "bf16"]  # fmt: skip
    with pytest.raises(InputError, match=r"option data\.dtype is bf16"):
        train.main(arguments)
    train.main([*arguments, "--precision", "bf16", "--pretrain.epochs", "1"])


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("data.prefetch", "0", "option data.prefetch is 0, wanted a number above 0"),
        ("data.cache.side", "0", "option data.cache.side is 0, wanted a number above 0"),
        ("data.cache.mode", "disk", "data.cache.mode is disk, wanted .*none"),
        ("data.on_bad_file", "ignore", "data.on_bad_file is ignore, wanted .*skip"),
    ],
)
def test_a_bad_data_option_is_one_sentence(manifest, tmp_path, option, value, sentence):
    arguments = [*SHORT, "--data.manifest", str(manifest), "--out", str(tmp_path / "run")]
    with pytest.raises(InputError, match=sentence) as error:
        train.main([*arguments, f"--{option}", value])
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_group_on_both_sides_of_a_split_is_refused_before_training(
    phantom_manifest, tmp_path, train_few_steps
):
    lines = phantom_manifest.read_text().splitlines()
    cells = [line.split(",") for line in lines]
    column = cells[0].index("group")
    for line in cells[1:]:
        line[column] = "one lesion"
    torn = phantom_manifest.with_name("torn.csv")
    torn.write_text("\n".join(map(",".join, cells)))
    with pytest.raises(InputError, match="are of one group, wanted each group in one split"):
        train_few_steps(torn, tmp_path / "run")
    assert not (tmp_path / "run").exists()
