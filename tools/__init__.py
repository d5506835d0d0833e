"""Tools for developers; run them from the repository's root.

python -m tools.check_kernels           compiles and checks every GPU kernel, without a GPU
python -m tools.gpu                     builds, tests and measures on an NVIDIA GPU (make gpu)
python -m tools.fit_special_functions   writes csrc/special_coefficients.h and coefficients.py
python -m tools.write_truth             writes csrc/tests/truth.h
"""
