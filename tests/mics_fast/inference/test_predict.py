"""The predict command: images in, opinions out, one modality or many, and when to ask a person."""

from __future__ import annotations

import csv
import json
import shutil

import pytest

from mics_fast import predict
from mics_fast.common.errors import InputError
from mics_fast.data.manifest import read_manifest
from mics_fast.inference.assessment import assess, opinion_table
from mics_fast.inference.run_classifier import run_manifest
from mics_fast.training.run import Run


@pytest.fixture(scope="module")
def images(phantom_manifest):
    """The files of the first pair."""
    return read_manifest(phantom_manifest).rows[0].files


def answers(tmp_path, *arguments):
    file = tmp_path / "answers.json"
    predict.main([*map(str, arguments), "--json", str(file)])
    return json.loads(file.read_text())


def test_one_pair_gets_one_answer(trained_run, images, tmp_path, capsys):
    (record,) = answers(tmp_path, trained_run, "--wli", images["wli"], "--nbi", images["nbi"])
    assert set(record) == {
        "id", "class", "probability", "belief", "uncertainty", "conflict", "refer", "views",
    }  # fmt: skip
    assert sum(record["probability"].values()) == pytest.approx(1, abs=1e-6)
    assert record["refer"] is None  # no threshold has been chosen
    assert set(record["views"]) == {"wli", "nbi", "fusion"} and record["id"] == images["wli"].stem
    assert sum(record["belief"].values()) + record["uncertainty"] == pytest.approx(1, abs=1e-6)
    assert record["class"] in capsys.readouterr().out


def test_one_modality_alone_gets_the_answer_of_that_modality(trained_run, images, tmp_path):
    (both,) = answers(tmp_path, trained_run, "--wli", images["wli"], "--nbi", images["nbi"])
    (alone,) = answers(tmp_path, trained_run, "--nbi", images["nbi"])
    assert set(alone["views"]) == {"nbi"} and alone["conflict"] == pytest.approx(0, abs=1e-6)
    assert alone["belief"] == pytest.approx(both["views"]["nbi"]["belief"], abs=1e-5)
    assert alone["views"]["nbi"]["belief"] == pytest.approx(alone["belief"], abs=1e-6)


def test_a_manifest_gets_what_evaluate_says_of_it(trained_run, phantom_manifest, tmp_path):
    records = answers(tmp_path, trained_run, "--manifest", phantom_manifest)
    manifest = read_manifest(phantom_manifest)
    assert [record["id"] for record in records] == [row.id for row in manifest.rows]
    run = Run.open(trained_run)
    found = assess(run, run_manifest(run), "test")
    said = {record["id"]: record for record in records}
    for row in opinion_table(found):
        assert row["class"] == said[row["id"]]["class"]
        assert row["uncertainty"] == pytest.approx(said[row["id"]]["uncertainty"], abs=1e-5)


@pytest.mark.parametrize(
    ("places", "name"),
    [({"wli": "wli", "nbi": "nbi"}, "{}"), ({"wli": "polyp_WLI", "nbi": "polyp_NBI"}, "polyp/{}")],
)
def test_a_folder_is_matched_by_stem(trained_run, images, tmp_path, places, name):
    folder = tmp_path / "images"
    for modality, place in places.items():
        (folder / place).mkdir(parents=True)
        shutil.copy(images[modality], folder / place / f"a{images[modality].suffix}")
    shutil.copy(images["wli"], folder / places["wli"] / "b.png")
    (folder / "other").mkdir()
    records = answers(tmp_path, trained_run, "--folder", folder)
    assert [record["id"] for record in records] == [name.format("a"), name.format("b")]
    assert [set(record["views"]) for record in records] == [{"wli", "nbi", "fusion"}, {"wli"}]


def test_lines_and_table_hold_what_the_list_holds(trained_run, phantom_manifest, tmp_path):
    lines, table = tmp_path / "answers.jsonl", tmp_path / "answers.csv"
    records = answers(
        tmp_path, trained_run, "--manifest", phantom_manifest, "--jsonl", lines, "--csv", table,
        "--refer-above", "0.5",
    )  # fmt: skip
    assert [json.loads(line) for line in lines.read_text().splitlines()] == records
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [record["class"] for record in records]
    assert float(rows[3]["nbi.uncertainty"]) == records[3]["views"]["nbi"]["uncertainty"]


def test_above_the_threshold_a_person_is_asked(trained_run, phantom_manifest, tmp_path):
    plain = answers(tmp_path, trained_run, "--manifest", phantom_manifest)
    middle = sorted(record["uncertainty"] for record in plain)[20]
    records = answers(
        tmp_path, trained_run, "--manifest", phantom_manifest, "--refer-above", middle
    )
    assert sum(record["refer"] for record in records) == sum(
        record["uncertainty"] > middle for record in plain
    )
    for record, before in zip(records, plain, strict=True):
        assert record["class"] == before["class"]
        assert record["refer"] == (before["uncertainty"] > middle)


def test_a_missing_column_of_the_table_stays_empty(trained_run, images, tmp_path):
    table = tmp_path / "answers.csv"
    predict.main([str(trained_run), "--wli", str(images["wli"]), "--csv", str(table)])
    with open(table, newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["nbi.class"] == row["fusion.class"] == "" and row["wli.class"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "there are no sources of images, wanted one"),
        (["--manifest", "a", "--folder", "b"], "there are 2 sources of images"),
        (["--xray", "a.png"], "option --xray is unknown: the modalities of .* are wli, nbi"),
        (["--wli", "nowhere.png"], r"--wli nowhere\.png does not exist"),
        (["--wli"], "--wli is not understood, wanted --<modality> FILE"),
        (["--folder", "nowhere"], "--folder nowhere is not a folder"),
        (["--wli", "a", "--refer-above", "2"], "--refer-above is 2.0, wanted a number from 0 to 1"),
        (["--manifest", "nowhere.csv"], r"nowhere\.csv"),
    ],
)
def test_bad_input_is_one_sentence(trained_run, arguments, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        predict.main([str(trained_run), *arguments])
    assert "\n" not in str(error.value)


def test_an_empty_folder_is_one_sentence(trained_run, tmp_path):
    (tmp_path / "wli").mkdir()
    with pytest.raises(InputError, match=r"holds no image, wanted folders called wli or nbi"):
        predict.main([str(trained_run), "--folder", str(tmp_path)])


def test_an_unreadable_image_is_named_and_leaves_no_file(trained_run, images, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("not an image")
    with pytest.raises(InputError, match=r"broken\.png is no image"):
        answers(tmp_path, trained_run, "--wli", broken)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.png"]


def test_another_model_s_checkpoint_is_refused(trained_run, tmp_path, images):
    other = tmp_path / "run"
    shutil.copytree(trained_run, other)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("fusion_depth: 2", "fusion_depth: 1"))
    with pytest.raises(InputError, match="is of another model: its model is"):
        predict.main([str(other), "--wli", str(images["wli"])])


def test_one_bad_file_costs_its_own_sample_alone(trained_run, phantom_manifest, tmp_path, capsys):
    folder = tmp_path / "in"
    for name in ("wli", "nbi"):
        shutil.copytree(phantom_manifest.parent / name, folder / name)
    bad = sorted((folder / "wli").iterdir())[3]
    bad.write_bytes(bad.read_bytes()[:300])
    lines = tmp_path / "a.jsonl"
    predict.main([str(trained_run), "--folder", str(folder), "--jsonl", str(lines)])
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [record["id"] for record in records] == sorted(p.stem for p in bad.parent.iterdir())
    failed = [record for record in records if "error" in record]
    assert [record["id"] for record in failed] == [bad.stem] and len(records) == 48
    assert set(failed[0]) == {"id", "error"} and f"{bad} cannot be decoded" in failed[0]["error"]
    assert "no answer for 1 of 48 samples" in capsys.readouterr().err


def test_a_file_that_is_not_there_costs_its_own_sample_alone(
    trained_run, phantom_manifest, tmp_path
):
    lines = phantom_manifest.read_text().splitlines()
    first = lines[1].split(",")
    gone = phantom_manifest.with_name("gone.csv")
    gone.write_text("\n".join([lines[0], ",".join([*first[:-1], "nbi/gone.png"]), *lines[2:5]]))
    records = answers(tmp_path, trained_run, "--manifest", gone)
    assert ["error" in record for record in records] == [True, False, False, False]
    assert "gone.png" in records[0]["error"]


def test_a_minus_sends_the_answers_to_standard_output(trained_run, images, capsys):
    predict.main([str(trained_run), "--wli", str(images["wli"]), "--json", "-"])
    (record,) = json.loads(capsys.readouterr().out)
    assert record["id"] == images["wli"].stem


def test_names_are_shown_as_they_are(trained_run, images, tmp_path, capsys):
    place = tmp_path / "wli"
    place.mkdir()
    for name in ("DOE[left]", "DOE[right]", "x[_b]", "bell\x07\x1b[31m"):
        shutil.copy(images["wli"], place / f"{name}.png")
    predict.main([str(trained_run), "--folder", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "DOE[left]" in shown and "DOE[right]" in shown and "x[_b]" in shown
    assert "\x07" not in shown and "\x1b" not in shown and "bell??[31m" in shown


def test_a_spreadsheet_finds_no_formula_in_the_table(trained_run, images, tmp_path):
    (tmp_path / "wli").mkdir()
    shutil.copy(images["wli"], tmp_path / "wli" / "=1+cmd.png")
    table = tmp_path / "answers.csv"
    predict.main([str(trained_run), "--folder", str(tmp_path), "--csv", str(table)])
    with open(table, newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["id"] == "'=1+cmd" and float(row["uncertainty"]) > 0


def test_anonymised_answers_carry_pseudonyms_alone(trained_run, images, tmp_path, capsys):
    for name in ("wli", "nbi"):
        (tmp_path / name).mkdir()
        shutil.copy(images[name], tmp_path / name / "DOE_JOHN.png")
    (tmp_path / "wli" / "ROE_JANE.png").write_bytes(b"no image")
    records = answers(tmp_path, trained_run, "--folder", tmp_path, "--anonymise", tmp_path / "key")
    said = capsys.readouterr().out + json.dumps(records)
    assert "DOE" not in said and "ROE" not in said and len({own["id"] for own in records}) == 2
    assert records[1]["error"] == "an image of this sample cannot be read"
