"""Builds csrc/ with CMake into mics_kernels._native; everything else stands in pyproject.toml.

CUDA goes in when nvcc and a GPU are found; MICS_CUDA=1 asks for it, for all supported GPUs, and
MICS_CUDA=0 leaves it out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CUDA = {"": "auto", "0": "OFF", "1": "ON"}


class CMakeBuild(build_ext):
    """One extension, one CMake target of the same name."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        wanted = os.environ.get("MICS_CUDA", "")
        if wanted not in CUDA:
            raise ValueError(f"MICS_CUDA must be 0, 1 or unset, got {wanted!r}")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMICS_CUDA={CUDA[wanted]}",
            f"-DMICS_MODULE_FILE={target.name}",
            f"-DMICS_MODULE_DIR={target.parent}",
        ]  # fmt: skip
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"the native module was not built: {error}") from error


# optional: without a compiler the package installs and works, only slower;
# `python -m mics_kernels` says what is missing.
# What MICS_CUDA asks for is not optional.
setup(
    ext_modules=[
        Extension("mics_kernels._native", sources=[], optional=os.environ.get("MICS_CUDA") != "1")
    ],
    cmdclass={"build_ext": CMakeBuild},
)
