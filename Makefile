# Set-up, demo and tests; each target does what it needs, and little the second time.
#
#   make demo     pre-train and transfer a small Big Transfer network, about 2 minutes
#   make test     every test
#   make setup    what both need: .venv, dependencies, the native library
#
# PYTHON  the interpreter that .venv is made with, 3.11 to 3.13
# TORCH   the torch to install, 2.11 or newer; 2.13.0 is what results in this repository were
#         measured with

PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
INSTALLED := $(VENV)/installed
BUILT := $(VENV)/built

.PHONY: setup demo test clean

setup: $(BUILT)

demo: $(BUILT)
	$(PY) -m bit.train

test: $(BUILT)
	$(PY) -m pytest

# timm, for the parity test, comes without its dependencies: it asks for torchvision, which needs
# one exact torch, and its model code does without.
$(INSTALLED): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip 'setuptools>=77' ninja pybind11
	$(PIP) '$(TORCH)'
	$(PIP) --no-build-isolation --editable '.[test]'
	$(PIP) --no-deps timm
	$(PIP) pyyaml huggingface_hub
	touch $@

$(BUILT): $(INSTALLED) setup.py $(shell find csrc -type f)
	$(PY) setup.py --quiet build_ext --inplace
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info bit_kernels/*.so
