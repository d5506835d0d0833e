"""Measure, print a table, and store it as JSON.

    python -m bench --quick | --full [--only SUBJECT ...] [--compare BASE.json] [--threads N]

Results go to bench/results/<device>/<date>-<commit>.json, those of --quick to ...-quick.json, which
git ignores and no table shows. They are written row by row, so a run that is stopped keeps its
rows. --compare fails if an operator lost ground (publish/compare.py). An implementation that is
wrong or raises an error is not timed; the others are, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.case import Case, Rivals, checked, in_a_line
from bench.machine import ROOT, from_nvidia_smi, machine, slug
from bench.memory import extra_megabytes
from bench.peaks import LARGEST, peaks_of
from bench.publish.compare import lost_ground
from bench.roofline import Peaks, floor_seconds
from bench.rows import Machine, Options, Row, StoredPeaks
from bench.timing import rows_of, take_turns

OPERATORS = ("evidential", "consistency", "shift")
SUBJECTS = (*OPERATORS, "features", "pipeline", "training", "host")


@dataclass(frozen=True)
class Request:
    """Options of this command only.

    Attributes:
        only: subjects.
        ours: skip the rivals.
        compare: a stored result to compare with; no operator may be slower.
        json: file for the result; None: in bench/results.
    """

    only: list[str]
    ours: bool
    compare: Path | None
    json: Path | None


def main() -> int:
    """Run the requested subjects; exit status 1 if something failed or lost ground."""
    options, request = parse()
    torch.set_num_threads(options.threads)
    facts = machine(options.device, "full" if options.full else "quick")
    print(", ".join(f"{key}: {value}" for key, value in facts.items() if value), flush=True)
    peaks: dict[str, StoredPeaks] = {}
    rows: list[Row] = []
    path = request.json or path_of(facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    for subject in request.only:
        for row in measured(subject, options, request.ours, peaks):
            rows.append({"subject": subject, **row})
            store(path, facts, peaks, rows)
        facts["gpu_under_load"] = from_nvidia_smi("clocks.sm,clocks.mem,power.draw")
    store(path, facts, peaks, rows)
    print_table(rows)
    print(f"\nstored in {path}")
    failed = any(row.get("failed") for row in rows)
    if request.compare is None:
        return int(failed)
    lost = lost_ground(rows, json.loads(request.compare.read_text())["rows"])
    print("\n".join(lost) or f"no operator lost ground against {request.compare}")
    return int(failed or bool(lost))


def store(path: Path, facts: Machine, peaks: dict[str, StoredPeaks], rows: list[Row]) -> None:
    """Write a result atomically."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"machine": facts, "peaks": peaks, "rows": rows}, indent=1) + "\n")
    new.replace(path)


def parse() -> tuple[Options, Request]:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--quick", action="store_true", help="1 s per case, no memory on a CPU")
    length.add_argument("--full", action="store_true", help="10 s per case")
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--ours", action="store_true", help="operators: skip the rivals")
    parser.add_argument("--compare", type=Path, metavar="BASE.json", help="fail where slower")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="store the result here instead")
    parser.add_argument("--manifest", type=Path, help="images for pipeline and training")
    parser.add_argument("--budget", type=float, help="seconds per case")
    parser.add_argument("--limit", type=float, default=math.inf,
                        help="seconds after which nothing new begins")  # fmt: skip
    given = parser.parse_args()
    if given.compare and not given.compare.is_file():
        parser.error(f"--compare: there is no file {given.compare}")
    default = 10.0 if given.full else 1.0
    options = Options(
        device=torch.device(given.device),
        full=given.full,
        threads=given.threads,
        budget=default if given.budget is None else given.budget,
        end=time.monotonic() + given.limit,
        manifest=given.manifest,
    )
    return options, Request(given.only, given.ours, given.compare, given.json)


def path_of(facts: Machine) -> Path:
    """Return the file for a result."""
    suffix = "-quick" if facts["mode"] == "quick" else ""
    folder = ROOT / "bench" / "results" / slug(facts["device"])
    return folder / f"{facts['date']}-{facts['commit']}{suffix}.json"


def measured(
    subject: str, options: Options, ours: bool, peaks: dict[str, StoredPeaks]
) -> Iterator[Row]:
    """Yield the rows of a subject, or one with the reason why there are none.

    Args:
        ours: skip the rivals of the operators.
        peaks: filled with the peaks per number of threads, for streams larger than any cache.
    """
    try:
        module = importlib.import_module(f"bench.{subject}")
    except ImportError as error:
        print(f"{subject}: not measured ({error})")
        yield {"absent": str(error)}
        return
    if subject in OPERATORS:
        yield from rows_of_operators(subject, module.cases(options.device), options, ours, peaks)
        return
    try:
        yield from module.rows(options)
    except Exception as error:  # the other subjects are still measured
        traceback.print_exc()
        yield {"absent": in_a_line(error), "failed": True}


def rows_of_operators(
    subject: str, cases: list[Case], options: Options, ours: bool, peaks: dict[str, StoredPeaks]
) -> Iterator[Row]:
    """Yield the rows of every case; one row for a case that fails or for which no time is left."""
    for case in cases:
        threads = case.threads or options.threads
        torch.set_num_threads(threads)
        if str(threads) not in peaks:
            peaks[str(threads)] = stored_peaks(peaks_of(options.device, LARGEST))
        label: Row = {
            "operator": case.operator, "shape": case.shape, "batch": case.batch,
            "threads": threads, "bytes": case.work.bytes, "flops": case.work.flops,
        }  # fmt: skip
        if time.monotonic() > options.end:
            yield absent(label | {"implementation": "all"}, "no time was left")
            continue
        try:
            yield from rows_of_case(subject, replace(case, threads=threads), options, ours, label)
        except Exception as error:  # the other cases are still measured
            traceback.print_exc()
            yield absent(label | {"implementation": "all"}, in_a_line(error), failed=True)
    torch.set_num_threads(options.threads)


def stored_peaks(peaks: Peaks) -> StoredPeaks:
    """Convert peaks for storage."""
    return {
        "bytes": peaks.bytes,
        "matrix_flops": peaks.matrix_flops,
        "vector_flops": peaks.vector_flops,
        "source": peaks.source,
        "reached": peaks.reached,
    }


def rows_of_case(
    subject: str, case: Case, options: Options, ours: bool, label: Row
) -> Iterator[Row]:
    """Yield one row per implementation; last, those that cannot run here or failed, and why."""
    torch._dynamo.reset()
    device = options.device
    rivals = checked(only_ours(case) if ours else case, device)
    peaks = peaks_of(device, case.work.bytes)
    label = label | {"bandwidth": peaks.bytes}
    turns = take_turns(case, rivals, device, options.budget)
    for row in rows_of(label, rivals, turns, 1e3 * floor_seconds(case.work, peaks)):
        name = row["implementation"]
        weighs = options.full or device.type == "cuda"
        step = rivals.found[name].step
        yield row | {
            "extra_mb": extra_megabytes(subject, case, name, step, device) if weighs else None
        }
    for name, reason in (rivals.absent | rivals.failed).items():
        yield absent(label | {"implementation": name}, reason, failed=name in rivals.failed)


def only_ours(case: Case) -> Case:
    """Remove the rivals of a case."""

    def make(device: torch.device, tiny: bool) -> Rivals:
        rivals = case.make(device, tiny)
        own = {name: rival for name, rival in rivals.found.items() if rival.ours}
        return replace(rivals, found=own, absent={})

    return replace(case, make=make)


def absent(label: Row, reason: str, *, failed: bool = False) -> Row:
    """Make and print a row that states why it has no figures."""
    what = f"{label['operator']:26} {label['shape']:18} {label['implementation']:20}"
    print(f"{what} {'FAILED' if failed else 'not measured'} ({reason})", flush=True)
    row = label | {"absent": reason}
    return row | {"failed": True} if failed else row


def print_table(rows: list[Row]) -> None:
    """Print medians and percentiles (per call, step or pair), ratios, floors and memory."""
    timed = [row for row in rows if "median_ms" in row]
    if timed:
        head = f"{'median':>9} {'p20':>9} {'p80':>9}  {'times':>6} {'floor':>6} {'memory':>8}"
        print(f"\n{'':66} {head}")
    for row in timed:
        name = f"{row['operator']}, {row['shape']}, {row['implementation']}"
        name += ", 1 thread" if row["threads"] == 1 else ""
        ratio, share, extra = row.get("ratio"), row.get("share_of_floor"), row.get("extra_mb")
        print(
            f"{name:66} {row['median_ms']:9.4f} {row['p20_ms']:9.4f} {row['p80_ms']:9.4f}  "
            f"{'-' if ratio is None else f'{ratio:.1f}x':>6} "
            f"{'-' if share is None else f'{100 * share:.0f} %':>6} "
            f"{'-' if extra is None else f'{extra:.1f} MB':>8}"
        )


if __name__ == "__main__":
    sys.exit(main())
