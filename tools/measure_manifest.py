"""Time and memory of opening a manifest of many rows, in a process of its own.

    python -m tools.measure_manifest 1000000 2000000 4000000
    python -m tools.measure_manifest 1000000 --distinct 1000000

For each number of rows, a manifest of two modalities is written to a temporary folder and opened
twice as training does, with its checks and digests: by the process that makes the index, and by
one that finds it. Every image exists, but all are links to a few empty files, and ``--distinct``
rows have images of their own, which the other rows name again. Memory is what opening added to the
process: that of its own, and the highest amount with the mapped index, which the processes of a
machine share.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

LINKS = 50_000  # to one file; file systems limit them to about 65,000
OPEN = """
import sys, time
from pathlib import Path
import mics_fast.training.trainer
from mics_fast.data.manifest import read_manifest
from mics_fast.data.manifest_checks import check_manifest

def mib(name):
    (line,) = (own for own in open("/proc/self/status") if own.startswith(name + ":"))
    return int(line.split()[1]) / 1024

private, whole = mib("RssAnon"), mib("VmRSS")
start, wall = time.process_time(), time.perf_counter()
manifest = read_manifest(Path(sys.argv[1]))
opened = time.process_time() - start
check_manifest(manifest)
train = manifest.select("train")
labelled = manifest.select("train", labelled=True)
manifest.digest()
ready, wall = time.process_time() - start, time.perf_counter() - wall
own, all_of_it = mib("RssAnon") - private, mib("VmHWM") - whole
print(f"{opened:.2f} {ready:.2f} {wall:.2f} {own:.0f} {all_of_it:.0f}")
"""


def main() -> None:
    """Print one line per number of rows and process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=int, nargs="+")
    parser.add_argument("--distinct", type=int, default=100)
    options = parser.parse_args()
    print("rows, process, CPU seconds to open, with checks and digests, wall, MiB of its own, MiB")
    for rows in options.rows:
        with TemporaryDirectory() as folder:
            path = write_many(Path(folder), rows, options.distinct)
            for process in ("first", "other"):
                command = [sys.executable, "-c", OPEN, str(path)]
                found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                print(f"{rows:,}", process, *found.split(), sep=", ", flush=True)


def write_many(folder: Path, rows: int, distinct: int) -> Path:
    """Write a manifest of many rows, four per group, and two images for each distinct row."""
    for row in range(distinct):
        if row % (LINKS // 2) == 0:
            empty = folder / f"{row}.jpg"
            empty.touch()
        for name in ("wli", "nbi"):
            image = folder / image_of(row, name)
            image.parent.mkdir(parents=True, exist_ok=True)
            os.link(empty, image)
    path = folder / "manifest.csv"
    with open(path, "w") as file:
        file.write("id,label,labelled,group,split,virtual,wli,nbi\n")
        for row in range(rows):
            split = ("train", "train", "train", "val", "test")[row // 4 % 5]
            file.write(
                f"hospital-a/{row:08d},class {row % 23},{int(row % 20 == 0)},lesion-{row // 4},"
                f"{split},,{image_of(row % distinct, 'wli')},{image_of(row % distinct, 'nbi')}\n"
            )
    return path


def image_of(row: int, modality: str) -> str:
    """Return the path of an image; a folder holds 10,000."""
    return f"images/{row // 5000:04d}/{row:08d}-{modality}.jpg"


if __name__ == "__main__":
    main()
