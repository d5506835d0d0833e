"""Plots of the stored results, in docs/plots, one set per device.

Time and memory of the consistency loss over the batch size, the share of the floor reached by each
kernel, and the training ladder. Colours are Okabe and Ito's colour-blind-safe palette; markers and
dashes differ as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench.machine import ROOT
from bench.publish.results import KINDS, Result, figure, latest, measured
from bench.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER = ROOT / "docs" / "plots"
OPERATORS = ("evidential", "consistency", "shift")
RUNGS = {
    "a": "a\npublished", "b": "b\nno SVD", "c, alternating": "c, first\n1 forward",
    "c": "c\n1 backward", "d, float32": "d, first\nSDPA", "d": "d\nbfloat16",
    "e": "e\ncompiled", "f": "f\nfused loss", "g": "g\ncached data", "h": "h\nCUDA graph",
}  # fmt: skip
"""Rungs of the ladder, and their labels."""
# colour, marker, dashes
STYLES = (
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#CC79A7", "D", ":"),
    ("#E69F00", "v", (0, (5, 1, 1, 1, 1, 1))),
    ("#56B4E9", "P", (0, (8, 2))),
)


class Plot(NamedTuple):
    """A plot: its file and title, the result, and the function that draws it."""

    path: Path
    title: str
    result: Result
    draw: Callable[[Axes, Result], None]


def plots(results: list[Result]) -> Iterator[Plot]:
    """Yield each plot for which there are figures."""
    for kind in KINDS:
        for device, result in latest(results, "consistency", kind).items():
            where = f"on {result.machine['device']}"
            time, memory = FOLDER / f"time-{device}.svg", FOLDER / f"memory-{device}.svg"
            title = f"Time of the consistency loss over the batch size, with its floor, {where}"
            yield Plot(time, title, result, time_over_batch)
            if any(row["extra_mb"] for row in soft_rows(result)):
                title = f"Memory of the consistency loss over the batch size, {where}"
                yield Plot(memory, title, result, memory_over_batch)
        for device in dict.fromkeys(
            device for subject in OPERATORS for device in latest(results, subject, kind)
        ):
            result = merged(results, device, kind)
            title = f"Share of its floor that each kernel reaches, on {result.machine['device']}"
            yield Plot(FOLDER / f"floor-{device}.svg", title, result, shares_of_floor)
        for device, result in latest(results, "training", kind).items():
            title = f"The training ladder on {result.machine['device']}"
            yield Plot(FOLDER / f"ladder-{device}.svg", title, result, ladder)


def merged(results: list[Result], device: str, kind: str) -> Result:
    """Merge the newest rows of every operator on a device into one result."""
    found = {subject: latest(results, subject, kind).get(device) for subject in OPERATORS}
    newest = {subject: result for subject, result in found.items() if result is not None}
    rows = [row for subject, result in newest.items() for row in result.of(subject)]
    first = next(iter(newest.values()))
    names = "+".join(dict.fromkeys(result.path.name for result in newest.values()))
    return Result(Path(names), first.machine, first.peaks, rows)


def source_of(result: Result) -> str:
    """Return the note in a plot's metadata that names its result."""
    return f"from {result.path.name}"


def stale_plots(results: list[Result]) -> list[str]:
    """List plots that are missing or show another result; needs no matplotlib."""
    return [
        str(one.path.relative_to(ROOT))
        for one in plots(results)
        if not one.path.exists() or source_of(one.result) not in one.path.read_text()
    ]


def draw(results: list[Result]) -> None:
    """Write every plot.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    wanted = list(plots(results))
    if not wanted:
        return
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("plots need matplotlib: pip install '.[bench]'") from None
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "mics-fast", "font.size": 10})
    import matplotlib.pyplot as plt

    FOLDER.mkdir(parents=True, exist_ok=True)
    for one in wanted:
        figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
        one.draw(axes, one.result)
        figure.savefig(one.path, metadata={"Date": None, "Description": source_of(one.result)})
        plt.close(figure)
        print(f"wrote {one.path.relative_to(ROOT)}")


def where(result: Result) -> str:
    """Describe device and threads, for a title."""
    machine = result.machine
    number = machine["threads"]
    threads = f", {number} thread{'s' * (number > 1)}" if machine["kind"] == "cpu" else ""
    return f"{machine['device']}{threads}, torch {machine['torch']}"


def floor_of(result: Result) -> str:
    """Describe the peak behind the floor."""
    reached = any(peaks["reached"] for peaks in result.peaks.values())
    return "torch's best copy or product" if reached else "bandwidth or FLOP/s in full"


def soft_rows(result: Result) -> list[Row]:
    """Return measured rows of the loss of two modalities, by batch size."""
    rows = measured(result.of("consistency", "multimodal_consistency_loss"))
    return sorted(rows, key=lambda row: row["batch"])


def curves(axes: Axes, result: Result, column: str) -> None:
    """Draw one line per implementation over the batch size, both axes logarithmic."""
    rows = soft_rows(result)
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    for name, (colour, marker, dashes) in zip(names, STYLES, strict=False):
        own = [row for row in rows if row["implementation"] == name and figure(row, column)]
        label = {"cpu": "ours, C++", "triton": "ours, Triton"}.get(name, name)
        axes.plot(
            [row["batch"] for row in own], [figure(row, column) or 0 for row in own],
            color=colour, marker=marker, linestyle=dashes, label=label,
        )  # fmt: skip
    batches = sorted({row["batch"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xlabel("batch size (rows per modality)")
    axes.grid(alpha=0.3)


def time_over_batch(axes: Axes, result: Result) -> None:
    """Draw medians, with the floor below."""
    curves(axes, result, "median_ms")
    floor = sorted({(row["batch"], row["floor_ms"] or 0) for row in soft_rows(result)})
    batches, least = zip(*floor, strict=True)
    axes.plot(batches, least, color="black", linewidth=1, label=f"floor: {floor_of(result)}")
    axes.fill_between(batches, least, axes.get_ylim()[0], color="black", alpha=0.08)
    axes.set_ylabel("forward + gradient, median (ms)")
    axes.set_title(f"Consistency loss, queue of 65,536 x 256\n{where(result)}", fontsize=10)
    axes.legend(fontsize=8)


def memory_over_batch(axes: Axes, result: Result) -> None:
    """Draw peaks beyond the inputs."""
    curves(axes, result, "extra_mb")
    axes.set_ylabel("peak memory beyond the inputs (MB)")
    axes.set_title(f"Consistency loss, queue of 65,536 x 256\n{where(result)}", fontsize=10)
    axes.legend(fontsize=8)


def shares_of_floor(axes: Axes, result: Result) -> None:
    """Draw one bar per kernel of ours."""
    rows = [row for row in result.rows if row.get("ours")]
    several = len({row["threads"] for row in rows}) > 1
    names = [
        f"{row['operator']}, {row['shape']}, {row['implementation']}"
        + (f", {row['threads']} thread{'s' * (row['threads'] > 1)}" if several else "")
        for row in rows
    ]
    shares = [100 * (row["share_of_floor"] or 0) for row in rows]
    bars = axes.barh(names, shares, color=STYLES[0][0])
    axes.bar_label(bars, [f"{share:.0f}" for share in shares], padding=3, fontsize=8)
    axes.axvline(100, color="black", linewidth=1, linestyle="--")
    axes.set_xlim(0, max(110, 1.1 * max(shares)))
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel(f"share of the floor (%); 100 = {floor_of(result)}")
    axes.set_title(where(result), fontsize=10, loc="right")


def ladder(axes: Axes, result: Result) -> None:
    """Draw the speed-up of each rung over the published step, one line per model."""
    rows = [row for row in measured(result.of("training")) if row["implementation"] in RUNGS]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    for shape, (colour, marker, dashes) in zip(shapes, STYLES, strict=False):
        own = [row for row in rows if row["shape"] == shape]
        names = [RUNGS[row["implementation"]] for row in own]
        factors = [row["x_ms"] or 0 for row in own]
        axes.plot(names, factors, color=colour, marker=marker, linestyle=dashes, label=shape)
        last = f"{factors[-1]:.3g}x\n{own[-1]['pairs_per_second']:.3g} pairs/s"
        axes.annotate(last, (names[-1], factors[-1]), textcoords="offset points", xytext=(7, 0),
                      va="center", fontsize=8)  # fmt: skip
    axes.set_xlim(-0.4, len(names) + 0.15)
    axes.set_ylim(0, 1.15 * max(row["x_ms"] or 0 for row in rows))
    axes.set_ylabel("times faster than the published step")
    axes.set_title(where(result), fontsize=10)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
