"""The native kernels, once for each set of instructions; everything else about the package is in pyproject.toml.

They are plain shared libraries, loaded through ctypes, with no tie to a Python or a torch version. Where they cannot be
built (another processor, no compiler) the package works without them, slower.
"""

from __future__ import annotations

import platform
from pathlib import Path

from setuptools import Extension, setup

# By the oldest processors that have the instructions; models/native/library.py picks one by what a machine has.
LEVELS = {
    "avx512": ["-march=cascadelake"],
    "bf16": ["-march=cooperlake"],
    "amx": ["-march=sapphirerapids"],
}
FLAGS = [
    "-std=c++17", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra",
    # GCC 12 takes its own intrinsics' undefined vectors for mistakes (its bug 105593).
    "-Wno-uninitialized", "-Wno-maybe-uninitialized",
]  # fmt: skip
LINK = ["-pthread", "-static-libstdc++", "-static-libgcc", "-Wl,--strip-debug"]

extensions = [
    Extension(
        f"nioserve.models.native.{level}",
        sources=sorted(map(str, Path("native").glob("*.cpp"))),
        depends=sorted(map(str, Path("native").glob("*.h"))),
        extra_compile_args=[*FLAGS, *flags],
        extra_link_args=LINK,
        language="c++",
        py_limited_api=True,
        optional=True,
    )
    for level, flags in LEVELS.items()
]

setup(
    ext_modules=extensions if platform.machine() == "x86_64" and platform.system() == "Linux" else [],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
