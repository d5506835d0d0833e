// Polynomials of special_functions.h and philox.h. Written by tools/fit_special_functions.py; increasing powers; t = 1/a, a >= 1.
#pragma once

// (h(a) - ln(a)/2 - 1) / (1 - t)
#define MICS_H_REST_COEFFICIENTS \
    4.1893855e-01f, 8.560408e-02f, 2.2931562e-03f, -8.972022e-03f, -2.6710285e-04f, 4.922225e-03f, -3.2835756e-03f, 7.6470873e-04f

// (digamma(a) - ln(a)) / t
#define MICS_DIGAMMA_COEFFICIENTS \
    -5.0e-01f, -8.333365e-02f, 9.257849e-06f, 8.222858e-03f, 6.978391e-04f, -6.5548206e-03f, 5.7045287e-03f, -2.3772647e-03f, 4.155863e-04f

// trigamma(a) / t
#define MICS_TRIGAMMA_COEFFICIENTS \
    1.0e+00f, 5.0000435e-01f, 1.6655065e-01f, 1.1716699e-03f, -3.9085377e-02f, 1.4520909e-02f, 8.504352e-03f, -9.132293e-03f, 2.3998218e-03f

// (1 - h'(a) / t) / (1 - t)
#define MICS_H_SLOPE_COEFFICIENTS \
    5.000001e-01f, 1.6665316e-01f, 2.7210193e-04f, -3.5303995e-02f, 6.026595e-03f, 1.8959993e-02f, -1.5781768e-02f, 4.10796e-03f

// ln(1 + q) / q for q in [0, 1]
#define MICS_LOG1P_COEFFICIENTS \
    1.0e+00f, -4.9999893e-01f, 3.332971e-01f, -2.4951616e-01f, 1.9663274e-01f, -1.5269667e-01f, 1.05436236e-01f, -5.637361e-02f, 1.9542526e-02f, -3.176057e-03f

// (ln(1 + f) - f + f^2/2) / f^3 for 1 + f in [sqrt(1/2), sqrt(2)]
#define MICS_LOG_COEFFICIENTS \
    3.333333e-01f, -2.5000307e-01f, 2.0001045e-01f, -1.6641282e-01f, 1.4214496e-01f, -1.2998183e-01f, 1.2622319e-01f, -7.902744e-02f

// the same, as exact as a normal number needs it
#define MICS_LOG_SHORT_COEFFICIENTS \
    3.3333415e-01f, -2.5000703e-01f, 1.9984223e-01f, -1.6602719e-01f, 1.47039e-01f, -1.4030892e-01f, 9.0487845e-02f

// sin(pi t / 2) / t in s = t^2 for |t| <= 1/2
#define MICS_SINE_COEFFICIENTS \
    1.5707964e+00f, -6.459635e-01f, 7.968022e-02f, -4.602149e-03f

// (cos(pi t / 2) - 1) / t^2 in s = t^2 for |t| <= 1/2
#define MICS_COSINE_COEFFICIENTS \
    -1.2337002e+00f, 2.5363752e-01f, -2.0521404e-02f

// (exp(x) - 1 - x) / x^2 for |x| <= ln(2)/2
#define MICS_EXP_COEFFICIENTS \
    5.0e-01f, 1.6666578e-01f, 4.1666556e-02f, 8.363174e-03f, 1.3926177e-03f
