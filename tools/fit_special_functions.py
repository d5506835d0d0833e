"""Fit the polynomials of special_functions.h and philox.h, for C++ and Triton.

Functions of the gamma family are smooth in t = 1 / a for a >= 1 once their logarithm is removed, so
one polynomial on (0, 1] replaces recurrences and asymptotic series (README.md of the evidential
operator). Each is interpolated in 40 digits at Chebyshev nodes, which is within a few per cent of
the minimax fit, and then rounded to float32.

Run from the root of the repository: python -m tools.fit_special_functions
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mpmath as mp
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
HEADER = ROOT / "csrc" / "special_coefficients.h"
MODULE = ROOT / "kernels" / "mics_kernels" / "coefficients.py"

mp.mp.dps = 40


def h(a: mp.mpf) -> mp.mpf:
    """lnGamma(a) - (a - 1) digamma(a) + a: the KL after its large terms have cancelled."""
    return mp.loggamma(a) - (a - 1) * mp.digamma(a) + a


def h_rest(t: mp.mpf) -> mp.mpf:
    """(h(a) - ln(a) / 2 - 1) / (1 - t): h(1) = 1 exactly, so this factor has no pole at t = 1."""
    return (h(1 / t) + mp.log(t) / 2 - 1) / (1 - t)


def h_slope_rest(t: mp.mpf) -> mp.mpf:
    """(1 - h'(a) / t) / (1 - t) with h'(a) = 1 - (a - 1) trigamma(a); h'(1) = 1 exactly."""
    return (1 - (1 - (1 / t - 1) * mp.psi(1, 1 / t)) / t) / (1 - t)


def log_rest(f: mp.mpf) -> mp.mpf:
    """(ln(1 + f) - f + f^2 / 2) / f^3."""
    return mp.fsum((-1) ** k * f**k / (k + 3) for k in range(200))


def exp_rest(x: mp.mpf) -> mp.mpf:
    """(exp(x) - 1 - x) / x^2."""
    return mp.fsum(x**k / mp.factorial(k + 2) for k in range(30))


# name -> (meaning, function, interval, degree)
Fit = tuple[str, Callable[[mp.mpf], mp.mpf], tuple[float, float], int]
FITS: dict[str, Fit] = {
    "H_REST": ("(h(a) - ln(a)/2 - 1) / (1 - t)", h_rest, (0, 1), 7),
    "DIGAMMA": (
        "(digamma(a) - ln(a)) / t",
        lambda t: (mp.digamma(1 / t) + mp.log(t)) / t,
        (0, 1),
        8,
    ),
    "TRIGAMMA": ("trigamma(a) / t", lambda t: mp.psi(1, 1 / t) / t, (0, 1), 8),
    "H_SLOPE": ("(1 - h'(a) / t) / (1 - t)", h_slope_rest, (0, 1), 7),
    "LOG1P": ("ln(1 + q) / q for q in [0, 1]", lambda q: mp.log1p(q) / q, (0, 1), 9),
    "LOG": (
        "(ln(1 + f) - f + f^2/2) / f^3 for 1 + f in [sqrt(1/2), sqrt(2)]",
        log_rest,
        (0.5**0.5 - 1, 2**0.5 - 1),
        7,
    ),
    "LOG_SHORT": (
        "the same, as exact as a normal number needs it",
        log_rest,
        (0.5**0.5 - 1, 2**0.5 - 1),
        6,
    ),
    "SINE": (
        "sin(pi t / 2) / t in s = t^2 for |t| <= 1/2",
        lambda s: mp.sin(mp.pi / 2 * mp.sqrt(s)) / mp.sqrt(s),
        (0, 0.25),
        3,
    ),
    "COSINE": (
        "(cos(pi t / 2) - 1) / t^2 in s = t^2 for |t| <= 1/2",
        lambda s: (mp.cos(mp.pi / 2 * mp.sqrt(s)) - 1) / s,
        (0, 0.25),
        2,
    ),
    "EXP": ("(exp(x) - 1 - x) / x^2 for |x| <= ln(2)/2", exp_rest, (-0.34658, 0.34658), 4),
}


def fit(name: str) -> list[np.float32]:
    """Compute coefficients in increasing powers, rounded to float32."""
    _, function, (low, high), degree = FITS[name]
    nodes = [
        (low + high) / mp.mpf(2)
        + (high - low) / mp.mpf(2) * mp.cos(mp.pi * (2 * j + 1) / (2 * degree + 2))
        for j in range(degree + 1)
    ]
    powers = mp.matrix([[x**k for k in range(degree + 1)] for x in nodes])
    values = mp.matrix([function(x) for x in nodes])
    return [np.float32(float(c)) for c in mp.lu_solve(powers, values)]


def float32_error(name: str, coefficients: list[np.float32]) -> float:
    """Return the largest absolute error of the polynomial in float32 by Horner's rule."""
    _, function, (low, high), _ = FITS[name]
    points = np.linspace(low, high, 1202, dtype=np.float32)[1:-1]
    sums = np.full_like(points, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        sums = sums * points + coefficient
    truth = np.array([float(function(mp.mpf(float(x)))) for x in points])
    return float(np.abs(sums - truth).max())


def main() -> None:
    """Fit, print the errors, and write both files."""
    table = {name: fit(name) for name in FITS}
    for name, coefficients in table.items():
        print(f"{name:9} degree {FITS[name][3]}  {float32_error(name, coefficients):.1e}")
    note = "Written by tools/fit_special_functions.py; increasing powers; t = 1/a, a >= 1"
    header = [f"// Polynomials of special_functions.h and philox.h. {note}.", "#pragma once", ""]
    module = ['"""Coefficients of the kernels\' polynomials.', "", f"{note}.", '"""', ""]
    for name, coefficients in table.items():
        digits = [np.format_float_scientific(c, unique=True, trim="0") for c in coefficients]
        header += [f"// {FITS[name][0]}", f"#define MICS_{name}_COEFFICIENTS \\"]
        header += [f"    {', '.join(f'{d}f' for d in digits)}", ""]
        module += [f"# {FITS[name][0]}", f"{name} = (", *(f"    {d}," for d in digits), ")"]
    HEADER.write_text("\n".join(header[:-1]) + "\n")
    MODULE.write_text("\n".join(module) + "\n")


if __name__ == "__main__":
    main()
