"""``python -m mics_kernels``: report versions, devices, and the backend of each operator."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import warnings

import torch

import mics_kernels
from mics_kernels.backends import IMPLEMENTATIONS, explain


def main() -> None:
    """Print versions, devices, the native module and the table of operators."""
    _print_table(_versions() + [("device", device, name) for device, name in _devices()])
    print()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table lists failed imports
        _print_table([("operator", "on", "takes", "why"), *_choices()])


def _versions() -> list[tuple[str, ...]]:
    rows = [
        ("mics_kernels", mics_kernels.__version__, ""),
        ("python", platform.python_version(), ""),
    ]
    for package in ("torch", "triton", "numpy"):
        try:
            rows.append((package, importlib.metadata.version(package), ""))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "missing", ""))
    return [*rows, ("native module", *_native())]


def _native() -> tuple[str, str]:
    try:
        module = importlib.import_module("mics_kernels._native")
    except ImportError as error:
        return "missing", str(error)
    return "present", ", ".join(f"{key}: {value}" for key, value in module.build_info().items())


def _devices() -> list[tuple[str, str]]:
    devices = [("cpu", f"{torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        devices.append((f"cuda:{index}", torch.cuda.get_device_name(index)))
    return devices


def _choices() -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for op in IMPLEMENTATIONS:
        for device, _ in _devices():
            try:
                choice = explain(op, torch.empty(0, device=device))
                rows.append((op, device, choice.backend, choice.reason))
            except (RuntimeError, ValueError) as error:  # the MICS_KERNELS_BACKEND cannot run
                rows.append((op, device, "none", str(error)))
    return rows


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    main()
