# Set-up, demo and tests; each target does what it needs, and little the second time.
#
#   make demo     pre-train and transfer a small Big Transfer network, about 2 minutes
#   make test     every test: the CPU's, those of JAX in a process of their own (others fork), Triton's
#                 kernels by its interpreter, and where torch sees a GPU, those on it
#   make test-gpu-static  every launch of R50x1 and R152x4, compiled for four GPUs that needn't be
#                 there, within its bounds; 10 to 20 minutes
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

.PHONY: setup demo test test-gpu-static clean

setup: $(BUILT)

demo: $(BUILT)
	$(PY) -m bit.train

OF_GPU_KERNELS := tests/ops tests/triton

test: $(BUILT)
	$(PY) -m pytest --ignore tests/xla
	$(PY) -m pytest tests/xla
	BIT_KERNELS_INTERPRET=1 $(PY) -m pytest $(OF_GPU_KERNELS)
	if $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  DEVICE=cuda $(PY) -m pytest $(OF_GPU_KERNELS); fi

test-gpu-static: $(BUILT)
	STATIC=full $(PY) -m pytest tests/triton/test_static.py

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
