"""Shared by the trainer's tests: tiny networks and batches that need no file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mics_fast.data.batch import PairBatch
from mics_fast.models.sizes import Size

TINY = Size(
    image=16, patch=4, width=16, depth=2, heads=2,
    decoder_width=16, decoder_depth=1, decoder_heads=2,
    discriminator_width=16, discriminator_depth=2, discriminator_heads=2,
)  # fmt: skip

FEW_STEPS = [
    "--config", str(Path(__file__).parents[2] / "configs" / "demo.yaml"),
    "--precision", "fp32",  # whatever this CPU is good at
    "--log_every", "1", "--pretrain.batch_size", "8", "--pretrain.epochs", "1",
    "--pretrain.steps", "null", "--finetune.steps", "null",
    "--pretrain.adversarial_weight", "0.1", "--pretrain.consistency_weight", "1",  # off in the demo
    "--finetune.labelled_batch", "6", "--finetune.unlabelled_batch", "8", "--finetune.epochs", "1",
]  # fmt: skip

FRAMES = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture
def tiny():
    return TINY


@pytest.fixture
def make_batch():
    """make_batch(rows, ...) -> PairBatch of two modalities."""

    def make(rows, classes=3, first_id=0, strong=False, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def images():
            return torch.randn(rows, 3, TINY.image, TINY.image, generator=generator)

        identity = torch.arange(first_id, first_id + rows)
        return PairBatch(
            views={"wli": images(), "nbi": images()},
            strong={"wli": images(), "nbi": images()} if strong else None,
            present=torch.ones(rows, 2, dtype=torch.bool),
            label=identity % classes,
            labelled=torch.ones(rows, dtype=torch.bool),
            sample_id=identity,
            group_id=identity,
        )

    return make


@pytest.fixture(scope="session")
def few_steps():
    """Options of the demo network, three steps per stage on ``phantom_manifest``."""
    return FEW_STEPS


@pytest.fixture(scope="session")
def phantom_manifest(tmp_path_factory):
    """48 phantom pairs: 24 train (half of them labelled), 12 val, 12 test."""
    from mics_fast import prepare  # here: tests of the step run without what commands need

    folder = tmp_path_factory.mktemp("shared-phantom")
    split = ["--split", "0.5", "0.25", "0.25", "--label-fraction", "0.5"]
    prepare.main(["phantom", "--out", str(folder), "--pairs", "48", *split])
    return folder / "manifest.csv"


@pytest.fixture(scope="session")
def trained_run(phantom_manifest, tmp_path_factory):
    """A run folder with both stages, three steps each; tests only read it."""
    from mics_fast import train

    run = tmp_path_factory.mktemp("shared-run") / "run"
    train.main([*FEW_STEPS, "--data.manifest", str(phantom_manifest), "--out", str(run)])
    return run


@pytest.fixture
def train_few_steps():
    """train_few_steps(manifest, run, *options): both stages of the demo network, a few steps."""
    from mics_fast import train

    def command(manifest, run, *options):
        train.main(
            [*FEW_STEPS, "--data.manifest", str(manifest), "--out", str(run), *map(str, options)]
        )

    return command


@pytest.fixture(scope="session")
def kvasir_seg():
    """Folder of the Kvasir-SEG frames and their labels.csv."""
    if not (FRAMES / "kvasir_seg").is_dir():
        pytest.skip(f"{FRAMES / 'kvasir_seg'} is not there")
    return FRAMES / "kvasir_seg"


@pytest.fixture(scope="session")
def kvasir_mini5():
    """Folder of native Kvasir frames, with one folder per class."""
    if not (FRAMES / "kvasir_mini5").is_dir():
        pytest.skip(f"{FRAMES / 'kvasir_mini5'} is not there")
    return FRAMES / "kvasir_mini5"
