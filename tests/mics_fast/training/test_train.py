"""Training and evaluation of a classifier from a manifest, through the command lines."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from mics_fast import evaluate, prepare, train
from mics_fast.common.errors import InputError, RunFailed
from mics_fast.engine.checkpoint import Checkpoints
from mics_fast.engine.loop import Loop

CONFIG = str(Path(__file__).parents[3] / "configs" / "demo.yaml")
SHORT = [
    "--config", CONFIG, "--log_every", "1", "--checkpoint_every", "2",
    "--pretrain.batch_size", "8", "--pretrain.epochs", "1",
    "--pretrain.steps", "null", "--finetune.steps", "null", "--finetune.select", "best",
    "--pretrain.adversarial_weight", "0.1", "--pretrain.consistency_weight", "1",  # off in the demo
    "--finetune.labelled_batch", "6", "--finetune.unlabelled_batch", "8", "--finetune.epochs", "1",
]  # fmt: skip
QUICK = ["--resamples", "5"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom")
    split = ["--split", "0.5", "0.25", "0.25"]
    prepare.main(["phantom", "--out", str(folder), "--pairs", "48", *split])
    return str(folder / "manifest.csv")


@pytest.fixture(scope="module")
def finished(manifest, tmp_path_factory):
    """A run folder in which both stages are complete."""
    run = tmp_path_factory.mktemp("runs") / "run"
    train.main([*SHORT, "--data.manifest", manifest, "--out", str(run)])
    return run


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run, stage):
    path = Checkpoints(run / "checkpoints" / stage).latest()
    return torch.load(path / "state.pt", weights_only=True)["stage"]


def test_a_run_leaves_configuration_metrics_events_and_checkpoints(finished):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["model"]["size"] == "vit_nano" and config["pretrain"]["batch_size"] == 8
    assert list((finished / "tensorboard").glob("events*"))
    lines = records(finished)
    assert [line["step"] for line in lines if line["stage"] == "pretrain"] == [1, 2, 3]
    assert [line["step"] for line in lines if line["stage"] == "finetune"] == [1, 2, 3]
    assert "val_macro_f1" in lines[-1]
    for stage in ("pretrain", "finetune"):
        assert Checkpoints(finished / "checkpoints" / stage).latest().name == "step-00000003"


def test_every_loss_in_the_log_is_the_weighted_sum_of_its_terms(finished):
    for line in records(finished):
        terms = [name[5:] for name in line if name.startswith("loss_")]
        weighted = sum(
            line.get(f"weight_{term}", 1.0) * line[f"loss_{term}"]
            for term in terms
            if term != "discriminator"
        )
        assert line["loss"] == pytest.approx(weighted, rel=1e-5)


@pytest.mark.parametrize("pretrained", [True, False])
def test_what_starts_untrained_learns_faster_and_the_log_says_how_fast(
    finished, manifest, tmp_path, pretrained
):
    start = str(finished) if pretrained else "none"
    options = ["--finetune.init", start, "--finetune.lr", "1e-4", "--finetune.head_lr_factor", "4"]
    options += ["--stage", "finetune", "--data.manifest", manifest, "--out", str(tmp_path / "run")]
    train.main([*SHORT, *options])
    rates = [(record["lr"], record["lr_heads"]) for record in records(tmp_path / "run")]
    assert max(heads for _, heads in rates) == pytest.approx(4e-4, rel=0.2)
    for encoders, heads in rates:
        assert heads == pytest.approx((4 if pretrained else 1) * encoders)


def test_fine_tuning_starts_from_the_run_s_own_pre_training(finished, manifest, tmp_path, capsys):
    train.main(
        [*SHORT, "--stage", "finetune", "--finetune.lr", "1e-30", "--data.manifest", manifest,
         "--finetune.init", str(finished), "--out", str(tmp_path / "run")]
    )  # fmt: skip
    assert "fine-tuning from" in capsys.readouterr().out
    before, after = weights(finished, "pretrain"), weights(tmp_path / "run", "finetune")
    name = "blocks.0.attn.qkv.weight"
    for modality in ("wli", "nbi"):
        torch.testing.assert_close(
            after[f"model.encoders.{modality}.{name}"], before[f"model.encoder.{name}"]
        )


def test_evaluate_reports_each_modality_and_the_fused_opinion(finished, tmp_path, capsys):
    file = tmp_path / "metrics.json"
    evaluate.main([str(finished), "--json", str(file), *QUICK])
    result = json.loads(file.read_text())
    assert set(result["views"]) == {"fused", "wli", "nbi"}
    wanted = {"accuracy", "balanced_accuracy", "macro_f1", "macro_auroc"}
    assert all(wanted <= set(metrics) for metrics in result["views"].values())
    assert result["n"] == 12 and result["split"] == "test" and len(result["classes"]) == 6
    shown = capsys.readouterr().out
    assert "fused" in shown and "virtual" not in shown


def test_a_derived_modality_is_called_virtual(finished, manifest, capsys):
    lines = Path(manifest).read_text().splitlines()
    derived = [",nbi,".join(line.rsplit(",,", 1)) for line in lines[1:]]
    other = Path(manifest).parent / "derived.csv"
    other.write_text("\n".join([lines[0], *derived]) + "\n")
    evaluate.main([str(finished), "--manifest", str(other), *QUICK])
    assert "virtual" in capsys.readouterr().out


def test_evaluating_twice_gives_the_same_numbers(finished, tmp_path):
    for name in ("a", "b"):
        evaluate.main([str(finished), "--json", str(tmp_path / name), *QUICK])
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()


def test_a_killed_run_goes_on_as_if_it_had_never_stopped(finished, manifest, tmp_path):
    run = tmp_path / "run"
    arguments = [*SHORT, "--data.manifest", manifest, "--out", str(run)]
    process = subprocess.Popen([sys.executable, "-m", "mics_fast.train", *arguments])
    deadline = time.monotonic() + 120
    while not list((run / "checkpoints").glob("*/step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run was over before it was killed"
    train.main([*arguments, "--resume"])
    for stage in ("pretrain", "finetune"):
        whole, resumed = weights(finished, stage), weights(run, stage)
        assert whole.keys() == resumed.keys()
        for name in whole:
            assert torch.equal(whole[name], resumed[name]), name
    last = records(run)[-1]
    assert last["loss"] == records(finished)[-1]["loss"]


def test_resuming_a_finished_run_does_nothing(finished, manifest):
    before = (finished / "metrics.jsonl").read_text()
    train.main([*SHORT, "--data.manifest", manifest, "--out", str(finished), "--resume"])
    assert (finished / "metrics.jsonl").read_text() == before


def test_resume_starts_a_run_that_is_not_there(manifest, tmp_path):
    run = tmp_path / "new"
    train.main(
        [*SHORT, "--stage", "pretrain", "--data.manifest", manifest, "--out", str(run), "--resume"]
    )
    assert weights(run, "pretrain")


def test_one_modality_alone_trains(manifest, tmp_path):
    run = tmp_path / "run"
    train.main(
        [*SHORT, "--data.manifest", manifest, "--data.modalities", "[nbi]", "--out", str(run)]
    )
    evaluate.main([str(run), "--json", str(tmp_path / "m.json"), *QUICK])
    assert set(json.loads((tmp_path / "m.json").read_text())["views"]) == {"fused", "nbi"}


def test_blocks_can_be_compiled(finished, manifest, tmp_path):
    run = tmp_path / "run"
    train.main(
        [*SHORT, "--stage", "pretrain", "--compile", "on", "--data.manifest", manifest,
         "--out", str(run)]
    )  # fmt: skip
    eager = [line["loss"] for line in records(finished) if line["stage"] == "pretrain"]
    compiled = [line["loss"] for line in records(run)]
    assert compiled == pytest.approx(eager, rel=1e-4)


def test_print_config_shows_every_option():
    command = [sys.executable, "-m", "mics_fast.train", "--config", CONFIG, "--print_config"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert yaml.safe_load(shown)["model"]["size"] == "vit_nano"
    assert yaml.safe_load(shown)["finetune"]["shift_strength"] == 0.7


@pytest.mark.parametrize("form", ["none", "diagonal", "low-rank", "closed-form"])
def test_one_option_chooses_the_form_of_the_shift(form):
    command = [sys.executable, "-m", "mics_fast.train", "--config", CONFIG, "--print_config"]
    command += [f"--finetune.shift={form}"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert yaml.safe_load(shown)["finetune"]["shift"] == form


def fails(module, arguments, status=2):
    """The one line that a failing command leaves on stderr, and its exit status."""
    done = subprocess.run(
        [sys.executable, "-m", f"mics_fast.{module}", *arguments], capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr and "usage" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_the_last_line_of_a_run_is_for_machines(finished, manifest, capsys):
    train.main([*SHORT, "--data.manifest", manifest, "--out", str(finished), "--resume"])
    word, _, text = capsys.readouterr().out.strip().splitlines()[-1].partition(" ")
    result = json.loads(text)
    assert word == "RESULT" and result["finished"] and result["run"] == str(finished)
    for stage, found in result["stages"].items():
        last = [line for line in records(finished) if line["stage"] == stage][-1]
        assert found["steps"] == 3 and found["loss"] == last["loss"]
        assert found["losses"] and found["pairs_per_second"] > 0 and found["seconds"] > 0
    assert list(result["stages"]) == ["pretrain", "finetune"]
    assert result["stages"]["finetune"]["best_step"] in (2, 3)
    assert set(result["stages"]["finetune"]["val"]) == {"macro_f1", "accuracy"}


def test_a_run_ends_with_its_scores_and_the_commands_to_try(finished, manifest, capsys):
    train.main([*SHORT, "--data.manifest", manifest, "--out", str(finished), "--resume"])
    shown = capsys.readouterr().out.splitlines()
    first_words = [line.split()[0] for line in shown if line.strip()]
    assert [word for word in first_words if word in ("fused", "wli", "nbi")] == [
        "fused", "wli", "nbi"
    ]  # fmt: skip
    (sentence,) = [line for line in shown if line.startswith("Of 100 patients like these")]
    assert "refer the 20 it is least sure of" in sentence
    start = next(number for number, line in enumerate(shown) if line.startswith("next: "))
    # 12 val rows are too few to promise a risk of 5 %, and enough for 10 %.
    assert f"mics-fast evaluate {finished} --target-risk 0.1" in shown[start]
    assert f"mics-fast report {finished}" in shown[start + 1]


def test_the_scores_a_run_ends_with_are_those_of_evaluate(finished, manifest, tmp_path, capsys):
    train.main([*SHORT, "--data.manifest", manifest, "--out", str(finished), "--resume"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = {line[0]: line[1] for line in lines if line and line[0] in ("fused", "wli", "nbi")}
    evaluate.main([str(finished), "--json", str(tmp_path / "scores.json"), *QUICK])
    views = json.loads((tmp_path / "scores.json").read_text())["views"]
    assert shown == {name: f"{own['accuracy']:.3f}" for name, own in views.items()}


def test_pre_training_alone_ends_with_how_to_fine_tune(manifest, tmp_path, capsys):
    run = tmp_path / "run"
    train.main([*SHORT, "--stage", "pretrain", "--data.manifest", manifest, "--out", str(run)])
    assert f"next: mics-fast train --stage finetune --resume --out {run}" in capsys.readouterr().out


def test_speed_and_operations_are_logged(manifest, tmp_path, capsys):
    run = tmp_path / "run"
    train.main(
        [*SHORT, "--stage", "finetune", "--finetune.epochs", "3", "--peak_tflops", "0.5",
         "--profile", "2", "--verbose", "--data.manifest", manifest, "--out", str(run)]
    )  # fmt: skip
    last = records(run)[-1]
    assert last["mfu"] == pytest.approx(last["tflops"] / 0.5) and last["tflops"] > 0
    shown = capsys.readouterr().out
    assert "GFLOP per step:  supervised" in shown and "TFLOP/s" in shown and "MFU" in shown
    phases = (run / "profile" / "finetune.txt").read_text().splitlines()[2:7]
    assert all(float(line.split()[1]) > 0 for line in phases)
    assert (run / "profile" / "finetune.json").exists()


def test_a_loss_that_breaks_ends_the_run_in_a_sentence(manifest, tmp_path):
    run = tmp_path / "run"
    arguments = [*SHORT, "--stage", "pretrain", "--data.manifest", manifest, "--out", str(run)]
    last = fails("train", [*arguments, "--pretrain.lr", "1e30"], status=1)
    (file,) = (run / "nonfinite").glob("pretrain-step-*.pt")
    assert str(file) in last and "not finite, on the samples" in last
    stored = torch.load(file, weights_only=True)["batch"][0]
    assert stored["views"]["wli"].shape == (8, 3, 64, 64)


def test_a_run_without_memory_names_the_batch_and_what_to_change(manifest, tmp_path, monkeypatch):
    def exhausted(self, batches):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Loop, "run", exhausted)
    arguments = [*SHORT, "--data.manifest", manifest, "--out", str(tmp_path / "run")]
    with pytest.raises(RunFailed, match=r"pretrain\.batch_size 8.*raise pretrain\.accumulate"):
        train.main(arguments)


def test_an_unknown_option_is_named(manifest, tmp_path):
    arguments = [*SHORT, "--data.manifest", manifest, "--out", str(tmp_path / "r")]
    assert "epocs" in fails("train", [*arguments, "--pretrain.epocs", "3"])


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("pretrain.epochs", "x", "pretrain.epochs.*x.*int"),
        ("model.size", "vit_huge", "model.size.*vit_huge.*vit_micro"),
        ("pretrain.epochs", "0", "option pretrain.epochs is 0, wanted a number above 0"),
        ("pretrain.accumulate", "3", "pretrain.accumulate is 3, wanted a divisor of .*size, 8"),
        ("finetune.accumulate", "4", "finetune.accumulate is 4, .* finetune.labelled_batch, 6"),
        ("checkpoint_minutes", "-1", "option checkpoint_minutes is -1.0, wanted"),
        ("cuda_graph", "true", "cuda_graph is true, wanted false on a CPU: it takes one GPU"),
        ("finetune.unlabelled_batch", "25", "_batch is 25, wanted at most 24, the train rows"),
        ("pretrain.queue_size", "0", "pretrain.queue_size is 0, wanted a number above 0"),
        ("finetune.head_lr_factor", "-1", "head_lr_factor is -1.0, wanted a number above 0"),
        ("peak_tflops", "0", "option peak_tflops is 0.0, wanted a number above 0"),
        ("pretrain.mask_ratio", "1.0", "option pretrain.mask_ratio is 1.0, wanted"),
        ("finetune.max_uncertainty", "2", "finetune.max_uncertainty is 2.0, wanted .* 0 to 1"),
        ("data.modalities", "[wli, xray]", "xray"),
        ("data.manifest", "", "option --data.manifest is missing"),
        ("data.manifest", "nowhere.csv", "nowhere.csv"),
        ("finetune.init", "nowhere", "finetune.init .*nowhere holds no pre-training checkpoint"),
        ("config", "nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_a_bad_option_is_one_sentence(manifest, tmp_path, option, value, sentence):
    arguments = [*SHORT, "--data.manifest", manifest, "--out", str(tmp_path / "r")]
    with pytest.raises(InputError, match=sentence) as error:
        train.main([*arguments, "--stage", "finetune", f"--{option}", value])
    assert "\n" not in str(error.value)


def test_a_run_is_never_overwritten(finished, manifest):
    arguments = [*SHORT, "--data.manifest", manifest, "--out", str(finished)]
    with pytest.raises(InputError, match="holds a run; add --resume to continue"):
        train.main(arguments)


def test_a_run_does_not_go_on_with_other_options(finished, manifest):
    arguments = [*SHORT, "--data.manifest", manifest, "--out", str(finished), "--resume"]
    with pytest.raises(InputError, match=r"pretrain\.lr is 0\.5, but .* was started with 0\.001"):
        train.main([*arguments, "--pretrain.lr", "0.5"])


def test_alternating_updates_know_no_parts_of_a_batch(manifest, tmp_path):
    arguments = [*SHORT, "--data.manifest", manifest, "--out", str(tmp_path / "r")]
    arguments += ["--pretrain.adversarial", "alternating", "--pretrain.accumulate", "2"]
    with pytest.raises(InputError, match=r"accumulate is 2, wanted 1 where pretrain\.adversarial"):
        train.main(arguments)


def test_an_output_folder_that_cannot_be_written_is_named(manifest, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = [*SHORT, "--data.manifest", manifest, "--out", str(tmp_path / "file" / "run")]
    assert "cannot be written" in fails("train", arguments)


def test_a_checkpoint_of_another_model_is_refused(finished, manifest, tmp_path):
    arguments = [*SHORT, "--stage", "finetune", "--data.manifest", manifest]
    arguments += ["--finetune.init", str(finished), "--model.projection", "64"]
    last = fails("train", [*arguments, "--out", str(tmp_path / "run")])
    assert "is of another model" in last and "projection" in last


def test_evaluating_other_classes_is_refused(finished, manifest, tmp_path):
    text = Path(manifest).read_text().splitlines()
    folder = Path(manifest).parent
    renamed = [line.replace(",", ",other-", 1) for line in text[1:]]
    other = folder / "other.csv"
    other.write_text("\n".join([text[0], *renamed]) + "\n")
    last = fails("evaluate", [str(finished), "--manifest", str(other)])
    assert "has class 'other-" in last and "wanted those of" in last


def test_evaluating_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no run: config\.yaml is missing"):
        evaluate.main([str(tmp_path)])


def test_an_empty_manifest_is_refused(manifest, tmp_path):
    empty = tmp_path / "manifest.csv"
    empty.write_text(Path(manifest).read_text().splitlines()[0] + "\n")
    arguments = [*SHORT, "--data.manifest", str(empty), "--out", str(tmp_path / "run")]
    assert str(empty) in fails("train", arguments)


def test_a_text_file_named_jpg_is_named_with_its_row(manifest, tmp_path):
    text = tmp_path / "broken.jpg"
    text.write_text("not an image")
    lines = Path(manifest).read_text().splitlines()
    folder = Path(manifest).parent
    row = next(i for i, line in enumerate(lines) if ",train," in line)
    path = lines[row].split(",")[-2]
    lines[row] = lines[row].replace(path, str(text))
    broken = folder / "broken.csv"
    broken.write_text("\n".join(lines) + "\n")
    arguments = [*SHORT, "--data.manifest", str(broken), "--out", str(tmp_path / "run")]
    last = fails("train", [*arguments, "--pretrain.epochs", "2"])
    assert "broken.jpg" in last and lines[row].split(",")[0] in last
