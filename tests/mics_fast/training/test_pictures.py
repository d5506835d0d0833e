"""TensorBoard shows options, reconstructions, predictions and the confusion matrix of a run."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mics_fast import train
from mics_fast.evaluation.opinions import Predictions
from mics_fast.training.pictures import (
    CELL,
    LINE,
    RIGHT,
    SIDE,
    WRONG,
    confusion_picture,
    prediction_strip,
)


def test_a_run_s_events_hold_options_and_pictures(trained_run):
    events = EventAccumulator(str(trained_run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()["images"]
    assert set(tags) == {
        "pretrain/reconstructions", "finetune/predictions", "finetune/confusion"
    }  # fmt: skip
    assert "_hparams_/experiment" in events.summary_metadata
    encoded = events.Images("pretrain/reconstructions")[-1].encoded_image_string
    picture = np.asarray(Image.open(io.BytesIO(encoded)))
    # Six samples; image, visible patches and reconstruction of two modalities.
    assert picture.shape == (6 * SIDE, 6 * SIDE, 3)
    first = picture[:SIDE, :SIDE].astype(int)
    assert first.max() == 255 and np.abs(first - picture[:SIDE, SIDE : 2 * SIDE]).mean() > 5


def test_images_of_patients_can_be_left_out(few_steps, phantom_manifest, tmp_path):
    manifest = ["--data.manifest", str(phantom_manifest), "--log.images", "false"]
    train.main([*few_steps, *manifest, "--out", str(tmp_path)])
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["finetune/confusion"]


def predictions_of(answers, truth, classes=3):
    probability = torch.nn.functional.one_hot(torch.tensor(answers), classes).float()
    label = torch.tensor(truth)
    return Predictions(probability, torch.zeros(len(label)), label, torch.arange(len(label)))


def test_a_right_answer_is_marked_unlike_a_wrong_one(make_batch):
    batch = make_batch(2)
    strip = prediction_strip(batch, predictions_of([0, 2], [0, 1]), ("a", "b", "c"))
    bar = strip[:, 2 * SIDE + 1]  # below an image of each of two modalities
    assert tuple(bar[:, 5].tolist()) == RIGHT
    assert tuple(bar[:, SIDE + 5].tolist()) == WRONG
    assert strip.shape == (3, 2 * SIDE + 2 * LINE + 4, 2 * SIDE) and strip.dtype == torch.uint8


def test_a_missing_image_is_black(make_batch):
    batch = make_batch(2)
    batch.present[1, 0] = False
    strip = prediction_strip(batch, predictions_of([0, 1], [0, 1]), ("a", "b", "c"))
    assert strip[:, :SIDE, SIDE:].max() == 0 and strip[:, SIDE : 2 * SIDE, SIDE:].max() > 0


def test_the_shade_of_a_cell_is_its_share_of_the_true_class():
    picture = confusion_picture([[3, 0], [2, 2]], ("a", "b"))
    left = picture.shape[2] - 2 * CELL

    def corner(row, column):
        return picture[:, LINE + row * CELL + 3, left + column * CELL + 3].tolist()

    assert corner(0, 0) == list(RIGHT) and corner(0, 1) == [255, 255, 255]
    assert corner(1, 0) == corner(1, 1) == [round(255 + 0.5 * (own - 255)) for own in RIGHT]
