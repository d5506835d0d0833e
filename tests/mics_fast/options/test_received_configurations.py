"""A configuration received from elsewhere is data: it runs no code and reads no other file."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from mics_fast import evaluate, experiment, export, predict, report, train
from mics_fast.common.errors import InputError
from mics_fast.options import TrainConfig
from mics_fast.options.commands import parse_train, read_config
from mics_fast.options.yaml_file import LARGEST

MODULE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nclass X: pass\n"
ATTACKS = {
    "a class for a part": "data: {class_path: received.X, init_args: {}}",
    "a class for a value": "model: {size: {class_path: received.X}}",
    "a class for a path": "out: {class_path: received.X}",
    "a class at the top": "class_path: received.X",
    "another file": "config: /etc/passwd",
    "a file for a part": "data: /etc/passwd",
    "a tag": "out: !!python/object/apply:os.system ['touch ran']",
    "a tag on a mapping": "data: !!python/object:received.X {}",
}


@pytest.fixture
def received(tmp_path, monkeypatch):
    """A run folder beside a module, in the current folder; what the module leaves when it ran."""
    (tmp_path / "received.py").write_text(MODULE)
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "run" / "config.yaml"
    assert not (tmp_path / "ran").exists() and "received" not in sys.modules


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_only_fields_of_the_options_are_read(received, attack, capsys):
    received.write_text(attack)
    with pytest.raises(InputError) as error:
        read_config(received)
    assert "root:" not in str(error.value) + capsys.readouterr().out
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "command",
    [
        lambda: predict.main(["run", "--wli", "x.png"]),
        lambda: evaluate.main(["run"]),
        lambda: report.main(["run"]),
        lambda: export.main(["run", "--out", "exported"]),
        lambda: train.main(["--resume", "--out", "run"]),
        lambda: train.main(["--config", "run/config.yaml", "--out", "o", "--data.manifest", "m"]),
        lambda: experiment.main(["--config", "run/config.yaml"]),
    ],
    ids=["predict", "evaluate", "report", "export", "train resumed", "train", "experiment"],
)
def test_every_command_refuses_a_run_whose_options_name_a_class(received, command):
    received.write_text(ATTACKS["a class for a part"])
    with pytest.raises(InputError, match=r"option data\.class_path in .*config\.yaml is unknown"):
        command()


@pytest.mark.parametrize(
    "option",
    [["--data", "{class_path: received.X}"], ["--data.class_path", "received.X"],
     ["--out", "{class_path: received.X}", "--data", "/etc/passwd"]],
)  # fmt: skip
def test_the_command_line_names_no_class_and_no_file_for_a_part(received, option):
    with pytest.raises(InputError, match=r"option --data\S* is unknown"):
        parse_train(option)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", r"an alias, \*a"),
        ("data: &d {mean: *d}", r"an alias, \*d"),
        ("[" * 1000, "more than 16 levels"),
        ("seed: 1\nseed: 2", "line 2: seed is there twice"),
        ("seed: [1", "line "),
        ("? [a]\n: 1", "a name that is a sequence"),
        ("- a", "is no mapping"),
        ("a: \x07", "special characters are not allowed"),
        ("data: 5", "option data in .* is 5, wanted the options below it"),
        ("seed: {a: 1}", "option seed in .* wanted int"),
        ("pretrain: {lrr: 1}", "option pretrain.lrr in .* is unknown; did you mean pretrain.lr"),
    ],
)
def test_a_file_that_is_no_plain_configuration_is_one_sentence(tmp_path, text, sentence):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=sentence) as error:
        read_config(file)
    assert str(file) in str(error.value)


def test_an_alias_bomb_costs_no_memory_and_no_time(tmp_path):
    file = tmp_path / "config.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    file.write_text("\n".join(lines))
    began = time.process_time()
    with pytest.raises(InputError, match="an alias"):
        read_config(file)
    assert time.process_time() - began < 1


def test_what_is_no_small_file_is_not_read(tmp_path):
    large, pipe = tmp_path / "large.yaml", tmp_path / "pipe.yaml"
    large.write_text("#" * (LARGEST + 1))
    os.mkfifo(pipe)
    for file, sentence in (
        (large, f"holds more than {LARGEST} bytes"),
        (pipe, "is no regular file"),
        ("/dev/zero", "is no regular file"),
        (tmp_path, "is no regular file"),
    ):
        with pytest.raises(InputError, match=sentence):
            parse_train(["--config", str(file)])


def test_bytes_that_are_no_text_are_refused(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_bytes(b"seed: \xff\xfe")
    with pytest.raises(InputError, match="wanted text in UTF-8"):
        read_config(file)
    file.write_bytes(b"")
    assert read_config(file) == TrainConfig()


@pytest.mark.parametrize("command", ["mics_fast.predict", "mics_fast"])
def test_a_module_in_the_current_folder_stands_in_for_no_other(tmp_path, command):
    for name in ("argparse", "yaml", "difflib", "torch"):
        (tmp_path / f"{name}.py").write_text(MODULE)
    arguments = ["predict", "--help"] if command == "mics_fast" else ["--help"]
    ended = subprocess.run([sys.executable, "-m", command, *arguments],
                           cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert not (tmp_path / "ran").exists()
