"""Time and memory of opening a manifest of many rows, in a process of its own.

    python -m tools.measure_manifest 1000000 2000000 4000000

For each number of rows, a manifest of two modalities is written to a temporary folder and opened
twice as training does, with its checks and digests: by the process that makes the index, and by
one that finds it. Every image exists, but is one of a hundred files. Memory is what opening added
to the process: that of its own, and the highest amount with the mapped index, which the processes
of a machine share.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

IMAGES = 100
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
    print("rows, process, CPU seconds to open, with checks and digests, wall, MiB of its own, MiB")
    for rows in parser.parse_args().rows:
        with TemporaryDirectory() as folder:
            path = write_many(Path(folder), rows)
            for process in ("first", "other"):
                command = [sys.executable, "-c", OPEN, str(path)]
                found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                print(f"{rows:,}", process, *found.split(), sep=", ", flush=True)


def write_many(folder: Path, rows: int) -> Path:
    """Write a manifest of many rows and a hundred empty images, four rows per group."""
    images = folder / "images" / "endoscopy"
    images.mkdir(parents=True)
    for number in range(IMAGES):
        for name in ("wli", "nbi"):
            (images / f"{number:06d}-{name}.jpg").touch()
    path = folder / "manifest.csv"
    with open(path, "w") as file:
        file.write("id,label,labelled,group,split,virtual,wli,nbi\n")
        for row in range(rows):
            at = f"images/endoscopy/{row % IMAGES:06d}"
            split = ("train", "train", "train", "val", "test")[row // 4 % 5]
            file.write(
                f"hospital-a/{row:08d},class {row % 23},{int(row % 20 == 0)},lesion-{row // 4},"
                f"{split},,{at}-wli.jpg,{at}-nbi.jpg\n"
            )
    return path


if __name__ == "__main__":
    main()
