# make demo | test | lint | docs | fuzz | fuzz-native | drill | bench | tables | gpu | check-kernels |
# check-encoders | check-wheel | clean
# Everything happens in .venv, installed once.
PYTHON ?= python3
PY := .venv/bin/python
# Run once more in Triton's interpreter, in a process of their own.
INTERPRETED := $(wildcard tests/kernels/test_*_backends.py) tests/kernels/test_consistency_triton.py
INSTALLED := .venv/.installed
# The tools of the build, too; pip 25.3 and later read the second name.
PINNED := PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_BUILD_CONSTRAINT=$(CURDIR)/constraints.txt

.PHONY: demo test test-native lint docs fuzz fuzz-native drill bench tables gpu check-kernels check-encoders \
	check-wheel clean

demo: $(INSTALLED)
	$(PY) examples/demo.py

# One process of tests per core, at most four: each trains its own small models. Files keep their order, in which the last
# ones are quick, so that all processes end together.
PARALLEL := --numprocesses auto --maxprocesses 4
test: lint test-native
	$(PY) -m pytest $(PARALLEL) --dist loadfile --no-loadscope-reorder
	TRITON_INTERPRET=1 $(PY) -m pytest $(PARALLEL) --dist worksteal $(INTERPRETED)

# The C++ headers alone, by CTest.
test-native: export PATH := $(CURDIR)/.venv/bin:$(PATH)
test-native: $(INSTALLED)
	cmake -S . -B build/tests -G Ninja -DBUILD_TESTING=ON -DMICS_PYTHON=OFF -DMICS_CUDA=OFF
	cmake --build build/tests
	ctest --test-dir build/tests --output-on-failure

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/clang-format --dry-run --Werror $(wildcard csrc/*.* csrc/tests/*.cpp csrc/tests/*.h)
	$(PY) -m mypy
	$(PY) -m bench.publish --check

# The documentation as a site, in site/; a broken link or a name that is gone is an error.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(INSTALLED)
	$(PY) -m mkdocs build --quiet --strict

# Tests that take as long as they are told to do not hang.
PATIENT := -o faulthandler_timeout=0

# Arbitrary arguments, mutated files and folders: every such test for so many seconds, half an hour in
# all; how many there were is shown; MICS_FUZZ_SEED chooses others. In `make test` each has a few seconds.
fuzz: export MICS_FUZZ_SECONDS ?= 150
fuzz: fuzz-native
	$(PY) -m pytest $(PATIENT) -rP -k "fuzz or mutated"

# The C++ tests and arbitrary arguments again, with csrc built with the address and undefined-behaviour
# sanitizers; CI fuzzes for a minute.
SANITIZED := build/sanitized
fuzz-native: export MICS_FUZZ_SECONDS ?= 60
fuzz-native: export PATH := $(CURDIR)/.venv/bin:$(PATH)
fuzz-native: $(INSTALLED)
	mkdir -p $(SANITIZED)/mics_kernels
	cp -r kernels/mics_kernels/. $(SANITIZED)/mics_kernels
	rm -f $(SANITIZED)/mics_kernels/_native*.so
	cmake -S . -B $(SANITIZED) -G Ninja -DMICS_SANITIZE=ON -DMICS_CUDA=OFF -DBUILD_TESTING=ON \
	  -DPython_EXECUTABLE=$(CURDIR)/$(PY) -Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir) \
	  -DMICS_MODULE_DIR=$(CURDIR)/$(SANITIZED)/mics_kernels
	cmake --build $(SANITIZED)
	ctest --test-dir $(SANITIZED) --output-on-failure
	PYTHONPATH=$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so.6)" \
	  MICS_NATIVE=$(CURDIR)/$(SANITIZED) $(PY) -m pytest $(PATIENT) -rP tests/kernels/test_fuzz_operators.py

# Kills a short run twenty times, also while it writes a checkpoint; CI does it three times.
drill: $(INSTALLED)
	MICS_DRILL_KILLS=20 $(PY) -m pytest $(PATIENT) tests/mics_fast/test_drill.py

# One second a case. `python -m bench --full` is what the documents show.
bench: $(INSTALLED)
	$(PY) -m bench --quick

# Tables and plots of docs/, from bench/results.
tables: $(INSTALLED)
	$(PY) -m bench.publish

# On a machine with an NVIDIA GPU, with the tools installed there: tests, times operators and training steps, in three
# parts of ten minutes at most. One alone: make gpu PART=operators
gpu:
	PYTHONPATH=kernels $(PYTHON) -m tools.gpu $(PART)

# Compiles the GPU kernels for all supported chips, without one; fails where registers spill. With several versions of
# Triton: make check-kernels TRITON="3.6.0 installed"
TRITON ?= installed
check-kernels: $(INSTALLED)
	$(PY) -m tools.check_kernels --triton $(TRITON)

# Compares the encoder with `transformers`, family by family, on random weights. With an exported DINOv2:
# make check-encoders ENCODERS="--onnx FILE --images FOLDER"
check-encoders: $(INSTALLED)
	$(PINNED) $(PY) -m pip install --quiet --constraint constraints.txt transformers
	$(PY) -m tools.check_encoders $(ENCODERS)

# Before a release: installs wheel and sdist in fresh environments with two versions of torch.
check-wheel:
	.ci/check-wheel $(PYTHON)

# Runs again only when what it installs has changed.
$(INSTALLED): pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*)
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PINNED) $(PY) -m pip install --quiet --constraint constraints.txt --editable '.[train,dali,export,test,bench,docs]'
	touch $@

clean:
	rm -rf .venv build runs site *.egg-info
