"""Commands end in a sentence, and problems with their output do not fail them."""

from __future__ import annotations

import io
import subprocess
import sys

from mics_fast.common.errors import wrapped

HEAD = "from mics_fast.common.errors import InputError, run_command\n"


def run(body, *, environment=None, stdout=subprocess.PIPE):
    """Run ``body`` as the main function of a command in a child process."""
    code = f"{HEAD}def main():\n" + "".join(f"    {line}\n" for line in body) + "run_command(main)"
    return subprocess.run(
        [sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True,
        env=environment, encoding="utf-8",
    )  # fmt: skip


def test_bad_input_is_one_sentence_and_status_2():
    done = run(["raise InputError('a is b, wanted c')"])
    assert (done.returncode, done.stderr) == (2, "error: a is b, wanted c\n")


def test_a_full_disk_is_one_sentence_that_names_the_file(tmp_path):
    body = ["from pathlib import Path", "from mics_fast.common.files import renamed",
            "from resource import RLIMIT_FSIZE, setrlimit", "setrlimit(RLIMIT_FSIZE, (10, 10))",
            f"with renamed(Path({str(tmp_path / 'a.bin')!r})) as partial:",
            "    partial.write_bytes(bytes(1000))"]  # fmt: skip
    done = run(body)
    sentence = f"error: {tmp_path / 'a.bin'} cannot be written: File too large\n"
    assert (done.returncode, done.stderr) == (2, sentence)
    assert list(tmp_path.iterdir()) == []


def test_other_faults_of_the_system_keep_their_traceback():
    done = run(["raise OSError(5, 'Input/output error')"])
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_ctrl_c_is_no_traceback_and_status_130():
    done = run(["raise KeyboardInterrupt"])
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_reader_that_goes_away_stops_nothing(tmp_path):
    body = ["for n in range(20000): print('a line', n)", f"open({str(tmp_path / 'done')!r}, 'w')"]
    code = f"{HEAD}def main():\n" + "".join(f"    {line}\n" for line in body) + "run_command(main)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait() == 0
    assert said == b"" and (tmp_path / "done").exists()


def test_a_terminal_without_umlauts_gets_escapes():
    import os

    done = run(["print('Geschw\\u00fcr')"], environment={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "Geschw\\xfcr\n", "")


def test_a_terminal_breaks_a_sentence_between_words_and_a_pipe_not_at_all(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "20")
    sentence = "/a/path/that/is/longer/than/the/terminal is no run folder of this project"
    lines = wrapped(sentence, Terminal()).split("\n")
    assert " ".join(lines) == sentence and lines[0].endswith("terminal")
    assert all(len(line) <= 20 for line in lines[1:]) and len(lines) > 2
    assert wrapped(sentence, io.StringIO()) == sentence
