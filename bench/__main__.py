"""Measures; prints a table, and stores it as JSON.

    python -m bench --quick | --full [--only SUBJECT ...] [--compare BASE.json] [--threads N]

Results go to bench/results/<device>/<date>-<commit>.json; those of --quick, which tables leave out
and git ignores, to ...-quick.json. They are written row by row: a run that is stopped leaves what
it has measured. --compare fails where an operator lost ground (compare.py). An implementation that
is wrong, or ends with an error, is not timed; the others are, and the run ends with status 1.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.case import Case, checked, in_a_line
from bench.machine import ROOT, from_nvidia_smi, machine, slug
from bench.memory import extra_megabytes
from bench.peaks import LARGEST, peaks_of
from bench.publish.compare import lost_ground
from bench.roofline import floor_seconds
from bench.timing import rows_of, take_turns

OPERATORS = ("evidential", "consistency", "shift")
SUBJECTS = (*OPERATORS, "pipeline", "training")
Row = dict[str, Any]


def main() -> int:
    """Run what is asked for; exit status 1 where something failed or has lost ground."""
    options = parse()
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    facts = machine(device) | {"mode": "full" if options.full else "quick"}
    print(", ".join(f"{key}: {value}" for key, value in facts.items() if value), flush=True)
    peaks: dict[str, Any] = {}
    rows: list[Row] = []
    path = options.json or path_of(facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    for subject in options.only:
        for row in measured(subject, device, options, peaks):
            rows.append({"subject": subject, **row})
            store(path, {"machine": facts, "peaks": peaks, "rows": rows})
        facts["gpu_under_load"] = from_nvidia_smi("clocks.sm,clocks.mem,power.draw")
    store(path, {"machine": facts, "peaks": peaks, "rows": rows})
    print_table(rows)
    print(f"\nstored in {path}")
    failed = any(row.get("failed") for row in rows)
    if not options.compare:
        return int(failed)
    lost = lost_ground(rows, json.loads(options.compare.read_text())["rows"])
    print("\n".join(lost) or f"no operator lost ground against {options.compare}")
    return int(failed or bool(lost))


def store(path: Path, found: dict[str, Any]) -> None:
    """Write a result; who stops the run meets the old file or the new one."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(found, indent=1) + "\n")
    new.replace(path)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--quick", action="store_true", help="1 s a case; no memory on a CPU")
    length.add_argument("--full", action="store_true", help="10 s a case")
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=SUBJECTS)
    parser.add_argument("--compare", type=Path, metavar="BASE.json", help="fail where slower")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="store results here instead")
    parser.add_argument("--manifest", type=Path, help="of images, for pipeline and training")
    parser.add_argument("--budget", type=float, help="seconds a case")
    parser.add_argument(
        "--limit", type=float, default=math.inf, help="seconds after which nothing new is begun"
    )
    options = parser.parse_args()
    if options.compare and not options.compare.is_file():
        parser.error(f"--compare: there is no file {options.compare}")
    if options.budget is None:
        options.budget = 10.0 if options.full else 1.0
    options.end = time.monotonic() + options.limit
    return options


def path_of(facts: Row) -> Path:
    """Where a result is stored."""
    suffix = "-quick" if facts["mode"] == "quick" else ""
    folder = ROOT / "bench" / "results" / slug(str(facts["device"]))
    return folder / f"{facts['date']}-{facts['commit']}{suffix}.json"


def measured(
    subject: str, device: torch.device, options: argparse.Namespace, peaks: dict[str, Any]
) -> Iterator[Row]:
    """Rows of a subject, or one row that says why there are none; ``peaks`` gets those of a number
    of threads, for streams that no cache holds."""
    try:
        module = importlib.import_module(f"bench.{subject}")
    except ImportError as error:
        print(f"{subject}: not measured ({error})")
        yield {"absent": str(error)}
        return
    if subject not in OPERATORS:
        try:
            yield from module.rows(device, options)
        except Exception as error:  # the other subjects go on
            traceback.print_exc()
            yield {"absent": in_a_line(error), "failed": True}
        return
    for case in module.cases(device):
        threads = case.threads or options.threads
        torch.set_num_threads(threads)
        case = replace(case, threads=threads)
        peaks[str(threads)] = peaks_of(device, LARGEST)._asdict()
        label: Row = {
            "operator": case.operator, "shape": case.shape, "batch": case.batch,
            "threads": threads, "bytes": case.work.bytes, "flops": case.work.flops,
        }  # fmt: skip
        if time.monotonic() > options.end:
            yield absent(label | {"implementation": "all"}, "no time was left", failed=False)
            continue
        try:
            yield from rows_of_case(subject, case, device, options, label)
        except Exception as error:  # the other cases go on
            traceback.print_exc()
            yield absent(label | {"implementation": "all"}, in_a_line(error), failed=True)
    torch.set_num_threads(options.threads)


def rows_of_case(
    subject: str, case: Case, device: torch.device, options: argparse.Namespace, label: Row
) -> Iterator[Row]:
    """A row for each implementation, those that cannot run here or fail last, with the reason."""
    torch._dynamo.reset()
    rivals = checked(case, device)
    peaks = peaks_of(device, case.work.bytes)
    label = label | {"bandwidth": peaks.bytes}
    turns = take_turns(case, rivals, device, options.budget)
    for row in rows_of(label, turns, 1e3 * floor_seconds(case.work, peaks)):
        name = str(row["implementation"])
        weighs = options.full or device.type == "cuda"
        extra = extra_megabytes(subject, case, name, rivals.steps[name], device) if weighs else None
        yield row | {"extra_mb": extra}
    for name, reason in (rivals.absent | rivals.failed).items():
        yield absent(label | {"implementation": name}, reason, failed=name in rivals.failed)


def absent(label: Row, reason: str, *, failed: bool) -> Row:
    """A row that says why it holds no figure; printed."""
    what = f"{label['operator']:26} {label['shape']:18} {label['implementation']:20}"
    print(f"{what} {'FAILED' if failed else 'not measured'} ({reason})", flush=True)
    return label | {"absent": reason} | ({"failed": True} if failed else {})


def print_table(rows: list[Row]) -> None:
    """Medians and percentiles (of a call, step or pair), ratios, shares of the floor, memory."""
    timed = [row for row in rows if "median_ms" in row]
    if timed:
        head = f"{'median':>9} {'p20':>9} {'p80':>9}  {'times':>6} {'floor':>6} {'memory':>8}"
        print(f"\n{'':66} {head}")
    for row in timed:
        name = f"{row['operator']}, {row['shape']}, {row['implementation']}"
        name += ", 1 thread" if row["threads"] == 1 else ""
        ratio, share, extra = (row.get(key) for key in ("ratio", "share_of_floor", "extra_mb"))
        print(
            f"{name:66} {row['median_ms']:9.4f} {row['p20_ms']:9.4f} {row['p80_ms']:9.4f}  "
            f"{'-' if ratio is None else f'{ratio:.1f}x':>6} "
            f"{'-' if share is None else f'{100 * share:.0f} %':>6} "
            f"{'-' if extra is None else f'{extra:.1f} MB':>8}"
        )


if __name__ == "__main__":
    sys.exit(main())
