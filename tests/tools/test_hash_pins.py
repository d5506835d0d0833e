"""The hashed requirements of CI are the pinned versions, all of them but torch."""

from __future__ import annotations

import re

from tools.hash_pins import LEFT_OUT, ROOT

HASHED = re.compile(r"^(\S+==\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", re.MULTILINE)


def test_ci_installs_the_pinned_versions_by_hash() -> None:
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {line for line in constraints if "==" in line and line.split("==")[0] not in LEFT_OUT}
    hashed = dict(HASHED.findall((ROOT / "requirements" / "ci.txt").read_text()))
    assert set(hashed) == pins, "run python -m tools.hash_pins"


def test_the_tools_of_the_build_are_pinned() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    wanted = re.search(r"^requires = \[(.*)\]$", project, re.MULTILINE)
    assert wanted is not None
    names = re.findall(r'"([\w-]+)', wanted[1])
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert names and set(names) <= pinned
