"""Write requirements/ci.txt: constraints.txt with the hashes of the wheels that CI may install.

``python -m tools.hash_pins`` asks pip which wheels it would choose for each supported Python on
64-bit Linux; nothing is installed. torch is excluded: its wheel, and so its hash, differs between
indexes (CPU, CUDA), so CI installs it separately.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11.13", "3.12.11", "3.13.7")
PLATFORMS = [
    *(f"manylinux_2_{minor}_x86_64" for minor in range(35, 4, -1)),
    "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64",
]  # fmt: skip
LEFT_OUT = ("torch",)
HEAD = """\
# Written by `python -m tools.hash_pins` from constraints.txt. torch is installed before, alone:
#   pip install --constraint constraints.txt torch
#   pip install --require-hashes --no-deps --requirement requirements/ci.txt
"""


def main() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    pins = [pin for pin in pins if pin.partition("==")[0] not in LEFT_OUT]
    hashes: dict[str, set[str]] = {pin: set() for pin in pins}
    for python in PYTHONS:
        for pin, digest in chosen_wheels(pins, python):
            hashes[pin].add(digest)
    target = ROOT / "requirements" / "ci.txt"
    target.parent.mkdir(exist_ok=True)
    lines = [
        " \\\n".join([pin, *(f"    --hash=sha256:{digest}" for digest in sorted(hashes[pin]))])
        for pin in pins
    ]
    target.write_text(HEAD + "\n".join(lines) + "\n")
    print(f"wrote {target}")


def chosen_wheels(pins: list[str], python: str) -> list[tuple[str, str]]:
    """Return (pin, SHA-256) of the wheel that pip would install for each pin under a Python."""
    with tempfile.TemporaryDirectory() as folder:
        report, wanted = Path(folder) / "report.json", Path(folder) / "pins.txt"
        wanted.write_text("\n".join(pins))
        platforms = [word for name in PLATFORMS for word in ("--platform", name)]
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps",
             "--ignore-installed", "--only-binary", ":all:", "--target", folder,
             "--python-version", python, "--implementation", "cp", *platforms,
             "--report", str(report), "--requirement", str(wanted)],
            check=True,
        )  # fmt: skip
        installs = json.loads(report.read_text())["install"]
    by_name = {plain(pin.partition("==")[0]): pin for pin in pins}
    wheels = []
    for own in installs:
        digest = own["download_info"]["archive_info"]["hashes"]["sha256"]
        wheels.append((by_name[plain(own["metadata"]["name"])], digest))
    return wheels


def plain(name: str) -> str:
    """Normalise a distribution's name as indexes do."""
    return name.lower().replace("_", "-").replace(".", "-")


if __name__ == "__main__":
    main()
