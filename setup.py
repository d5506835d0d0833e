"""Builds csrc/ with CMake into mics_kernels._native; everything else stands in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """One extension, one CMake target of the same name."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMICS_MODULE_FILE={target.name}",
            f"-DMICS_MODULE_DIR={target.parent}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


# optional: without a compiler the package installs and works, only slower;
# `python -m mics_kernels` says what is missing.
setup(
    ext_modules=[Extension("mics_kernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
