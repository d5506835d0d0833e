"""A pretended GPU: Triton's real compiler and launcher, and our real wrappers, without hardware.

``install`` puts a stand-in for the CUDA driver (driver.c) below Triton, which reports an H100, and
lets our operators take CPU tensors for GPU tensors. Kernels are compiled for sm_90 and passed to
the driver with their arguments; the driver records the launch and does nothing, so results hold no
values. It shows which kernels are launched, with which grid, and the host time until then.

It cannot be removed: use a child process. Needs a C compiler and Linux.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from mics_kernels import backends
from mics_kernels.backends import IMPLEMENTATIONS

CAPABILITY, PROCESSORS = 90, 132


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int  # bytes of shared memory per program


class StubDriver(nvidia.CudaDriver):
    """Triton's driver without PyTorch's CUDA, which is absent."""

    def __init__(self) -> None:
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher
        self.get_device_capability = lambda device: (CAPABILITY // 10, CAPABILITY % 10)
        self.get_current_stream = lambda device: 0
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Recorded(ctypes.Structure):
    """``struct launch`` of driver.c."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared", ctypes.c_uint),
    )


class Stub:
    """The installed stand-in.

    Args:
        library: driver.c, compiled and loaded.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.stub_launched.restype = ctypes.c_ulong
        library.stub_launch.argtypes = (ctypes.c_ulong,)
        library.stub_launch.restype = ctypes.POINTER(Recorded)

    @contextmanager
    def launches(self) -> Iterator[list[Launch]]:
        """Record the launches within the context; the list is filled when it ends."""
        found: list[Launch] = []
        first = self._library.stub_launched()
        yield found
        for number in range(first, self._library.stub_launched()):
            one = self._library.stub_launch(number).contents
            found.append(Launch(one.name.decode(), tuple(one.grid), one.threads, one.shared))


def obstacle() -> str:
    """Explain why the stand-in cannot be installed here; "" if it can."""
    if sys.platform != "linux":
        return "it needs Linux"
    if torch.cuda.is_available():
        return "it would stand in for the driver of a GPU that is there"
    return "" if compiler() else "it needs a C compiler"


def compiler() -> str:
    """Return the C compiler, or ""."""
    names = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    return next((name for name in names if name and shutil.which(name)), "")


def install() -> Stub:
    """Install the stand-in, and let the operators take CPU tensors for GPU tensors.

    Raises:
        RuntimeError: it cannot be installed here; see ``obstacle``.
    """
    if reason := obstacle():
        raise RuntimeError(f"no stand-in for the CUDA driver: {reason}")
    folder = tempfile.mkdtemp(prefix="stub-")  # Triton may link each kernel's launcher against it
    atexit.register(shutil.rmtree, folder)
    library = Path(folder) / "libcuda.so.1"
    headers = Path(nvidia.__file__).parent / "include"
    source = Path(__file__).with_name("driver.c")
    command = [compiler(), "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{headers}"]
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = folder
    stub = Stub(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL))
    triton.runtime.driver.set_active(StubDriver())
    for op, rows in IMPLEMENTATIONS.items():
        IMPLEMENTATIONS[op] = tuple(
            row._replace(refuses=lambda tensor: "") for row in rows if row.backend == "triton"
        )
        backends.implementation(op, "triton")
    replace("chip_of", lambda device: (CAPABILITY, PROCESSORS))
    replace("looks_at_values", lambda value: False)  # values of a GPU are not checked
    return stub


def replace(name: str, function: Callable[..., Any]) -> None:
    """Replace a function of this name in every module of mics_kernels."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("mics_kernels") and name in vars(module):
            setattr(module, name, function)
