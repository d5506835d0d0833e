"""Loaders: the batches made from rows, in training and in evaluation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mics_fast.data.loaders import TrainLoader
from mics_fast.options import AugmentConfig, DataConfig
from tests.mics_fast.data.loading import (
    CPU,
    NAMES,
    NO_COLOUR,
    WHOLE_FRAME,
    evaluate,
    noise,
    row,
    save,
    take,
    tensors,
    train,
)


@pytest.mark.parametrize("strong", [False, True])
def test_a_training_batch_has_the_promised_shapes_and_types(rows, strong):
    batch = next(train(rows, strong=strong))
    assert list(batch.views) == list(NAMES)
    assert (batch.strong is not None) == strong
    for name, value in tensors(batch).items():
        if name.startswith(("weak", "strong")):
            assert value.shape == (4, 3, 16, 16) and value.dtype == torch.float32
    assert batch.present.shape == (4, 2) and batch.present.dtype == torch.bool
    assert batch.labelled.shape == (4,) and batch.labelled.dtype == torch.bool
    for value in (batch.label, batch.sample_id, batch.group_id):
        assert value.shape == (4,) and value.dtype == torch.int64


def test_labels_and_ids_are_those_of_the_rows(rows):
    rows = [replace(rows[0], label=-1), *rows[1:]]
    by_index = {row.index: row for row in rows}
    for batch in (*take(train(rows), 4), *evaluate(rows)):
        found = [by_index[i] for i in batch.sample_id.tolist()]
        assert batch.label.tolist() == [row.label for row in found]
        assert batch.labelled.tolist() == [row.labelled for row in found]
        assert batch.group_id.tolist() == [row.group for row in found]


def test_the_images_are_those_of_the_row(rows):
    config = AugmentConfig(**WHOLE_FRAME, weak=NO_COLOUR)
    whole = {
        i: {name: batch.views[name][k] for name in NAMES}
        for batch in evaluate(rows)
        for k, i in enumerate(batch.sample_id.tolist())
    }
    for batch in take(train(rows, augment=config), 4):
        for k, i in enumerate(batch.sample_id.tolist()):
            for name in NAMES:
                assert torch.equal(batch.views[name][k], whole[i][name])


def test_a_missing_modality_is_zero_and_marked_absent(rows):
    some = [
        replace(rows[0], files={"wli": rows[0].files["wli"], "nbi": None}),
        replace(rows[1], files={"wli": None, "nbi": rows[1].files["nbi"]}),
        rows[2],
    ]
    data = DataConfig()
    expected = {100: [True, False], 101: [False, True], 102: [True, True]}
    training = train(some, data=data, strong=True, batch_size=3)
    for batch in (next(training), *evaluate(some, data=data)):
        for k, i in enumerate(batch.sample_id.tolist()):
            assert batch.present[k].tolist() == expected[i]
            for column, name in enumerate(NAMES):
                for views in filter(None, (batch.views, batch.strong)):
                    assert views[name][k].any() == expected[i][column]


def test_a_missing_modality_does_not_change_the_other(rows):
    alone = [replace(row, files={**row.files, "nbi": None}) for row in rows]
    a, b = next(train(rows)), next(train(alone))
    assert torch.equal(a.views["wli"], b.views["wli"])


def test_a_batch_keeps_its_values_when_the_next_ones_are_made(rows):
    loader = train(rows, strong=True)
    batch = next(loader)
    before = {name: value.clone() for name, value in tensors(batch).items()}
    take(loader, 5)
    assert all(torch.equal(value, before[name]) for name, value in tensors(batch).items())


def test_one_modality_and_three_work_as_two_do(rows):
    three = [replace(row, files={**row.files, "blue": row.files["wli"]}) for row in rows]
    for names in (("wli",), ("blue", "nbi", "wli")):
        loader = TrainLoader(
            three,
            names,
            data=DataConfig(),
            augment=AugmentConfig(),
            image_size=8,
            batch_size=2,
            seed=0,
            strong=True,
            device=CPU,
        )
        batch = next(loader)
        assert tuple(batch.views) == tuple(batch.strong) == names
        assert batch.present.shape == (2, len(names))


def test_evaluation_goes_once_through_the_rows_in_order_any_number_of_times(rows):
    loader = evaluate(rows)
    assert len(loader) == 2
    next(iter(loader))  # a pass that is given up
    for _ in range(2):
        batches = list(loader)
        assert [len(batch.label) for batch in batches] == [4, 3]
        assert [len(batch.views["nbi"]) for batch in batches] == [4, 3]
        assert torch.cat([batch.sample_id for batch in batches]).tolist() == list(range(100, 107))


def test_evaluation_does_not_depend_on_the_batch_size(rows):
    whole = torch.cat([batch.views["wli"] for batch in evaluate(rows, batch_size=50)])
    single = torch.cat([batch.views["wli"] for batch in evaluate(rows, batch_size=1)])
    assert torch.equal(whole, single)


def test_nothing_to_evaluate_is_no_batch():
    assert len(evaluate([])) == 0 and list(evaluate([])) == []


def test_the_evaluation_view_is_the_whole_frame(folder):
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, :32, 0] = 255
    wide[16:, :, 1] = 255
    path = save(wide, folder / "wide.png")
    (batch,) = evaluate([row(0, path, path)])
    red, green, _ = batch.views["wli"][0]
    assert (red[:, :7] == 255).all() and (red[:, 9:] == 0).all()
    assert (green[:7] == 0).all() and (green[9:] == 255).all()


def test_a_smaller_image_is_averaged_not_sampled(folder):
    path = save(noise(9, 64, 64), folder / "large-noise.png")
    (batch,) = evaluate([row(0, path, path)], image_size=8)
    # noise of 74 grey levels: 37 where four pixels are interpolated, 6 where a triangle filter of
    # 16 pixels takes the mean
    assert batch.views["wli"].std() < 12
