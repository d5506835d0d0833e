"""Mutated configurations, run folders and weights files: a sentence or a value, never a traceback.

Each test runs for ``MICS_FUZZ_SECONDS`` (default: 3).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

import pytest
import torch

from mics_fast.common.errors import InputError
from mics_fast.engine.checkpoint import fitting, load_checkpoint, weights_of, write_state
from mics_fast.models.initial_weights import load_initial_weights
from mics_fast.models.vit import VisionTransformer
from mics_fast.options import TrainConfig
from mics_fast.options.commands import parse_train
from mics_fast.options.parsing import as_yaml
from mics_fast.training.run import Run
from tests.mics_fast.mutation import SEED, draws, mutated

PIECES = [b"", b"{", b"}", b"[" * 300, b"]", b":", b"\n", b"  ", b"- ", b"&a ", b"*a", b"<<: *a",
          b"!!python/name:os.system ", b"class_path: os.system", b"config: /etc/passwd", b"null",
          b"~", b"NaN", b"Infinity", b"1e999", b"-1", b"9" * 400, b"true", b'"', b"'", b"\0",
          b"\xff", b"\xef\xbb\xbf", b"? ", b"| ", b"%YAML 9.9\n", b"---\n",
          b"x" * 3000]  # fmt: skip


@pytest.fixture
def one_sentence(request):
    """one_sentence(action, draw): runs it; an InputError of one short line will do."""

    def attempt(action, number):
        try:
            action()
        except InputError as error:
            assert str(error).count("\n") == 0, (number, error)
        except Exception as error:  # the number repeats it: MICS_FUZZ_SEED
            raise AssertionError(f"mutation {number}: {type(error).__name__}: {error}") from error

    return attempt


@pytest.fixture
def run(tmp_path):
    """A run folder with one small checkpoint, written as training writes it."""
    folder = tmp_path / "run"
    checkpoint = folder / "checkpoints" / "finetune" / "step-00000004"
    checkpoint.mkdir(parents=True)
    config = TrainConfig(out=str(folder))
    (folder / "config.yaml").write_text(as_yaml(asdict(config)))
    (folder / "manifest.json").write_text(json.dumps({"rows": "4", "id": "ab", "split": "cd"}))
    records = [{"stage": "finetune", "step": n, "loss": 1.0 / n, "seconds": n, "val_f1": 0.5}
               for n in range(1, 5)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(own) + "\n" for own in records))
    best = {"step": 4, "score": 0.5}
    (checkpoint.parent / "best.json").write_text(json.dumps(best))
    stage = {f"average.{name}": own for name, own in torch.nn.Linear(3, 2).state_dict().items()}
    state = {"step": 4, "stage": stage, "optimisers": {"model": {"state": {0: {}}}}, "seconds": 1.0}
    write_state(checkpoint, state, {"stage": "finetune", "modalities": ["wli"], "classes": ["a"]})
    return folder


def read_everything(folder):
    run = Run.open(folder)
    run.digest()
    run.result()
    checkpoint = run.checkpoints("finetune").best()
    state = load_checkpoint(checkpoint, {"stage": "finetune"})
    with fitting("checkpoint"):
        torch.nn.Linear(3, 2).load_state_dict(weights_of(state, "average"))


def test_every_file_of_a_run_folder(run, one_sentence):
    read_everything(run)
    files = [run / name for name in ("config.yaml", "manifest.json", "metrics.jsonl")]
    files += (run / "checkpoints").rglob("*.*")
    whole = {file: file.read_bytes() for file in files}
    assert len(whole) == 6
    for number, draw in enumerate(draws(), SEED):
        file = draw.choice(list(whole))
        file.write_bytes(mutated(draw, whole[file], PIECES))
        one_sentence(lambda: read_everything(run), number)
        file.write_bytes(whole[file])


def test_a_state_whose_checksum_was_made_to_fit(run, one_sentence):
    """As somebody who sends a run would do it: pickles, archives and names are mutated."""
    checkpoint = run / "checkpoints" / "finetune" / "step-00000004"
    state, meta = checkpoint / "state.pt", json.loads((checkpoint / "meta.json").read_text())
    whole = state.read_bytes()
    for number, draw in enumerate(draws(), SEED):
        data = mutated(draw, whole, PIECES)
        state.write_bytes(data)
        meta["sha256"] = hashlib.sha256(data).hexdigest()
        (checkpoint / "meta.json").write_text(json.dumps(meta))
        one_sentence(lambda: read_everything(run), number)


def test_configurations_and_command_lines(tmp_path, one_sentence):
    file = tmp_path / "config.yaml"
    whole = as_yaml(asdict(TrainConfig())).encode()
    texts = ["--seed", "--data.mean", "--finetune.augment.crop_scale", "--threads", "--model.size"]
    for number, draw in enumerate(draws(), SEED):
        file.write_bytes(mutated(draw, whole, PIECES))
        one_sentence(lambda: parse_train(["--config", str(file)]), number)
        text = draw.choice(PIECES).decode(errors="surrogateescape")
        option = draw.choice(texts)
        one_sentence(lambda option=option, text=text: parse_train([f"{option}={text}"]), number)


def test_weights_files(tmp_path, one_sentence):
    file, own = tmp_path / "vit.pth", VisionTransformer(16, 8, 8, 1, 1)
    torch.save({"model": own.state_dict()}, file)
    whole = file.read_bytes()
    for number, draw in enumerate(draws(), SEED):
        file.write_bytes(mutated(draw, whole, PIECES))
        one_sentence(lambda: load_initial_weights(file, [own]), number)
