"""The Python API: load a run or an exported folder; predict files, arrays, folders, manifests."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import mics_fast
from mics_fast import export
from mics_fast.common.errors import InputError
from mics_fast.data.manifest import read_manifest
from tests.mics_fast.mutated_images import IMAGES
from tests.mics_fast.mutation import draws, mutated


@pytest.fixture(scope="module")
def model(trained_run):
    return mics_fast.load(trained_run)


@pytest.fixture(scope="module")
def images(phantom_manifest):
    """The files of the first pair."""
    return read_manifest(phantom_manifest).rows[0].files


def test_importing_the_package_imports_nothing_heavy():
    heavy = "{'torch', 'numpy', 'rich', 'nvidia', 'yaml'}"
    code = f"import sys, mics_fast; mics_fast.load; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_package_states_its_version():
    assert mics_fast.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mics_fast.nonsense


def test_the_model_names_its_classes_and_modalities(model):
    assert model.modalities == ("wli", "nbi") and len(model.classes) == 6


def test_files_and_arrays_and_manifests_get_the_same_answer(model, images, phantom_manifest):
    files = {name: str(file) for name, file in images.items()}
    arrays = {name: np.asarray(Image.open(file).convert("RGB")) for name, file in images.items()}
    (of_files,) = model.predict(files)
    (of_arrays,) = model.predict(arrays)
    of_manifest = model.predict(phantom_manifest)[0]
    of_folder = model.predict(phantom_manifest.parent)[0]
    for other in (of_arrays, of_manifest, of_folder):
        assert other["class"] == of_files["class"]
        assert other["belief"] == pytest.approx(of_files["belief"], abs=1e-5)
        assert other["uncertainty"] == pytest.approx(of_files["uncertainty"], abs=1e-5)


def test_many_samples_are_numbered_and_one_modality_is_enough(model):
    generator = np.random.default_rng(0)
    frames = [generator.integers(0, 256, (40, 50, 3), dtype=np.uint8) for _ in range(18)]
    answers = model.predict([{"nbi": frame} for frame in frames], refer_above=0.0)
    assert [own["id"] for own in answers] == [str(n) for n in range(18)]
    assert all(set(own["views"]) == {"nbi"} and own["refer"] for own in answers)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ({"xray": "a.png"}, "modality xray is unknown: those of the model are wli, nbi"),
        ({"wli": np.zeros((4, 4), np.uint8)}, r"wli array has shape \(4, 4\) and type uint8"),
        ({"wli": np.zeros((4, 4, 3))}, "type float64, wanted"),
        ({"wli": "a.png", "nbi": np.zeros((4, 4, 3), np.uint8)}, "both files and arrays"),
        ([{}], "a sample has no image, wanted wli or nbi"),
        ({"wli": "nowhere.png"}, r"nowhere\.png cannot be read"),
        ("nowhere.csv", r"nowhere\.csv"),
    ],
)
def test_a_source_that_cannot_be_used_is_one_sentence(model, source, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        model.predict(source)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_run_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        mics_fast.load(tmp_path)


def test_an_exported_folder_is_loaded_like_a_run(trained_run, images, model, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the [export] extra")
    export.main([str(trained_run), "--out", str(tmp_path / "model"), "--resamples", "2"])
    other = mics_fast.load(tmp_path / "model")
    (answer,) = other.predict(images)
    assert answer["belief"] == pytest.approx(model.predict(images)[0]["belief"], abs=1e-5)


def test_mutated_images_become_answers_or_failures(model, images, tmp_path):
    whole = {name: str(file) for name, file in images.items()}
    for draw in draws():
        samples = [whole]
        for number in range(4):
            file = tmp_path / f"{number}.png"
            file.write_bytes(mutated(draw, draw.choice(IMAGES)))
            samples.append({**whole, draw.choice(["wli", "nbi"]): str(file)})
        records = model.predict(samples)
        assert len(records) == 5 and "class" in records[0]
        for number, record in enumerate(records[1:]):
            if "error" in record:
                assert f"{number}.png" in record["error"] and "\n" not in record["error"]
            else:
                assert sum(record["probability"].values()) == pytest.approx(1, abs=1e-4)
