"""Write csrc/tests/truth.h: special functions at 1 + e in 40 digits, for the C++ tests.

Run from the root of the repository: python -m tools.write_truth
"""

from __future__ import annotations

from pathlib import Path

import mpmath as mp
import numpy as np

TARGET = Path(__file__).resolve().parents[1] / "csrc" / "tests" / "truth.h"

mp.mp.dps = 40


def main() -> None:
    """Write one line for each e: 0, then 1e-6 to 1e12."""
    points = [0.0, *np.geomspace(1e-6, 1e12, 91)]
    lines = [
        "// Written by tools/write_truth.py with mpmath, 40 digits.",
        "#pragma once",
        "struct Truth {",
        "    float e;  // a = 1 + e",
        "    double log1p, exp_minus, digamma, trigamma, h_less_1, h_slope;",
        "};",
        "constexpr Truth kTruth[] = {",
    ]
    for point in points:
        e = mp.mpf(float(np.float32(point)))
        a = 1 + e
        psi, psi1 = mp.digamma(a), mp.psi(1, a)
        h = mp.loggamma(a) - e * psi + a
        row = (mp.log1p(e), mp.exp(-e), psi, psi1, h - 1, 1 - e * psi1)
        numbers = ", ".join(mp.nstr(x, 20) if abs(x) > 1e-300 else "0.0" for x in row)
        lines.append(f"    {{{float(e)!r}f, {numbers}}},")
    TARGET.write_text("\n".join([*lines, "};"]) + "\n")


if __name__ == "__main__":
    main()
