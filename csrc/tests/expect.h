// Minimal test support: report each wrong number, and count them for the exit status.
#pragma once

#include <cmath>
#include <cstdio>

inline int failures = 0;

inline void expect_near(const char* what, double at, double got, double wanted, double tolerance) {
    if (std::fabs(got - wanted) <= tolerance) return;  // false for NaN
    std::printf("%s at %g: got %.9g, wanted %.9g (off by %.2g, allowed %.2g)\n", what, at, got,
                wanted, std::fabs(got - wanted), tolerance);
    ++failures;
}

inline void expect(const char* what, bool holds) {
    if (holds) return;
    std::printf("wrong: %s\n", what);
    ++failures;
}
