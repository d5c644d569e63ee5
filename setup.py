"""Builds the wheel. The native core is compiled by CMake where there is a compiler; without one the package still installs.

The pure-Python install computes with the PyTorch twins of every op: same results, roughly a hundred times slower. It says so here
and again, once, when a model is loaded. ``HELEXA_BUILD_NATIVE=1`` turns the notice into an error, ``=0`` skips the core.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NOTICE = """
    helexa: the native core was NOT built: {reason}
    helexa will run on its plain PyTorch twins, which give the same results at a small fraction of the speed.
    Install a C++17 compiler and CMake 3.21 or newer, then install again. HELEXA_BUILD_NATIVE=1 makes this an error.
"""


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def run(self) -> None:
        wanted = os.environ.get("HELEXA_BUILD_NATIVE", "auto")
        if wanted == "0":
            self._skip("HELEXA_BUILD_NATIVE=0")
            return
        missing = self._missing_tool()
        if missing is None:
            try:
                super().run()
                return
            except (subprocess.CalledProcessError, OSError) as error:
                if wanted == "1":
                    raise
                missing = f"the build failed ({error})"
        if wanted == "1":
            raise RuntimeError(f"HELEXA_BUILD_NATIVE=1 but {missing}")
        self._skip(missing)

    def _missing_tool(self) -> str | None:
        if shutil.which("cmake") is None:
            return "cmake is not on the path"
        if not (os.environ.get("CXX") or any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++"))):
            return "no C++ compiler is on the path"
        return None

    def _skip(self, reason: str) -> None:
        sys.stderr.write(NOTICE.format(reason=reason))
        self.extensions = []

    def build_extension(self, extension: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        subprocess.run(
            [
                "cmake", *generator, "-S", str(ROOT), "-B", str(build),
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            ],
            check=True,
        )  # fmt: skip
        subprocess.run(
            ["cmake", "--build", str(build), "--target", "_native", "--parallel", str(os.cpu_count() or 1)], check=True
        )


setup(ext_modules=[CMakeExtension("helexa_engine._native")], cmdclass={"build_ext": CMakeBuild})
