"""Explanation pictures follow the network and its input, and leave black borders out."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
from torch import nn

from mics_fast import export, predict
from mics_fast.common.errors import InputError
from mics_fast.data.manifest import read_manifest
from mics_fast.inference.explanation import BLACK, dark_patches, explain, saliency
from mics_fast.inference.run_classifier import load_run
from mics_fast.inference.samples import named_rows
from mics_fast.models.classifier import Classifier
from mics_fast.training.run import Run


@pytest.fixture
def model(tiny):
    torch.manual_seed(0)
    return Classifier(tiny, ("wli", "nbi"), 3, pool="mean", fusion_depth=1).eval()


def flat(weights):
    return torch.cat([own.flatten() for own in weights.values()]).numpy()


def test_saliency_is_nothing_where_a_modality_is_missing(model, tiny, make_batch):
    batch = make_batch(3)
    batch.present[0, 0] = False
    weight = saliency(model, batch, tiny.patch)
    assert weight["wli"].shape == (3, 4, 4)
    assert weight["wli"][0].sum() == 0 and weight["wli"][1].sum() > 0 and weight["nbi"][0].sum() > 0


def test_saliency_finds_the_one_patch_that_a_network_reads(tiny, make_batch):
    class ReadsOnePatch(nn.Module):
        def forward(self, views, present):
            value = views["wli"][:, :, 4:8, 8:12].mean((1, 2, 3))  # row 1, column 2 of patches
            logits = torch.stack([value, -value, 0 * value], 1)
            return SimpleNamespace(logits=logits.unsqueeze(1), present=present[:, :1])

    weight = saliency(ReadsOnePatch(), SimpleNamespace(
        views={"wli": make_batch(2).views["wli"]}, present=torch.ones(2, 1, dtype=torch.bool)
    ), tiny.patch)["wli"]  # fmt: skip
    found = (weight > 0).nonzero().tolist()
    assert found == [[0, 1, 2], [1, 1, 2]]


def test_saliency_follows_the_weights_of_the_network(model, tiny, make_batch):
    # The sanity check of Adebayo et al. (2018): a picture that stays the same with random weights
    # shows the image, not the network.
    batch = make_batch(8)
    own = flat(saliency(model, batch, tiny.patch))
    nearly = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in nearly.parameters():
            parameter.mul_(1.001)
    torch.manual_seed(1)
    random = Classifier(tiny, ("wli", "nbi"), 3, pool="mean", fusion_depth=1).eval()
    assert spearmanr(own, flat(saliency(nearly, batch, tiny.patch))).statistic > 0.95
    assert abs(spearmanr(own, flat(saliency(random, batch, tiny.patch))).statistic) < 0.4


def test_a_patch_is_dark_where_most_of_its_pixels_are():
    image = np.full((64, 64, 3), BLACK, dtype=np.uint8)
    image[16:48, 20:64] = 200  # the second column of patches begins at 16: a quarter is black
    expected = torch.ones(4, 4, dtype=torch.bool)
    expected[1:3, 1:] = False
    assert torch.equal(dark_patches(image, 64, 4), expected)
    # Frames of other sizes are seen as the encoder sees them, resized to a square.
    assert torch.equal(dark_patches(image.repeat(2, 0).repeat(3, 1), 64, 4), expected)


@pytest.fixture(scope="module")
def bordered(tmp_path_factory):
    """A pair whose left half is black."""
    folder = tmp_path_factory.mktemp("bordered")
    noise = np.random.default_rng(0).integers(30, 256, (2, 64, 64, 3), dtype=np.uint8)
    noise[:, :, :32] = 0
    files = {name: folder / f"{name}.png" for name in ("wli", "nbi")}
    for file, image in zip(files.values(), noise, strict=True):
        Image.fromarray(image).save(file)
    return files


def test_nothing_black_is_tinted(trained_run, bordered):
    (row,) = named_rows([bordered], ("wli", "nbi"))
    ((_, found),) = explain(load_run(Run.open(trained_run)), [row])
    for own in found.values():
        half = own.weight.shape[1] // 2
        assert own.weight[:, :half].max() == 0 and own.weight[:, half:].max() > 0
        picture = own.picture().astype(int)
        left = picture[:, : picture.shape[1] // 2]
        assert (left.max(2) == left.min(2)).all()  # grey alone
        assert (picture.max(2) > picture.min(2)).any()


def test_predict_writes_a_picture_per_image(trained_run, bordered, tmp_path):
    images = [word for name, file in bordered.items() for word in (f"--{name}", str(file))]
    predict.main([str(trained_run), *images, "--explain", str(tmp_path / "why")])
    written = sorted(path.name for path in (tmp_path / "why").iterdir())
    assert len(written) == 2 and written[0].endswith("-nbi.png") and written[1].endswith("-wli.png")
    assert Image.open(tmp_path / "why" / written[0]).size == (256, 256)


def test_answers_are_the_same_with_pictures(trained_run, phantom_manifest, tmp_path):
    command = [str(trained_run), "--manifest", str(phantom_manifest), "--json"]
    predict.main([*command, str(tmp_path / "a.json")])
    predict.main([*command, str(tmp_path / "b.json"), "--explain", str(tmp_path / "why")])
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(
        (tmp_path / "b.json").read_text()
    )
    rows = read_manifest(phantom_manifest).rows
    assert len(list((tmp_path / "why").iterdir())) == 2 * len(rows)


def test_what_has_no_gradient_is_refused(trained_run, bordered, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the [export] extra")
    export.main([str(trained_run), "--out", str(tmp_path / "out"), "--resamples", "2"])
    images = [word for name, file in bordered.items() for word in (f"--{name}", str(file))]
    for models in ([tmp_path / "out"], [trained_run, trained_run]):
        with pytest.raises(InputError, match="--explain needs the gradient of one network"):
            predict.main([*map(str, models), *images, "--explain", str(tmp_path / "why")])
    with pytest.raises(InputError, match="draws on frames, which may show names"):
        predict.main([str(trained_run), *images, "--explain", "why", "--anonymise", "key"])
