# make quickstart | lint | test | test-all | test-oldest | gpu | soak | bench | verify-published      (each prepares .venv by itself)
PYTHON ?= python3
PY := .venv/bin/python
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q
JOBS ?= 2
.PHONY: quickstart quickstart-segmentation quickstart-detection lint test test-all test-oldest gpu soak bench verify-published clean
.DEFAULT_GOAL := quickstart

# A stamp newer than both requirement files: installing again costs a minute, checking costs nothing.
.venv/installed: requirements.txt requirements-dev.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.11 or later (Debian: apt install python3 python3-venv)."; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$($(PYTHON) --version) is too old: Python 3.11 or later is needed; name another with 'make PYTHON=python3.12'."; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is missing: install it (Debian: apt install python3-venv)."; exit 2; }
	@echo "Installing into .venv (about 6 GB with PyTorch; a minute or more) ..."
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	@touch $@

# A fresh folder each time: an earlier run is kept under the time it was made.
quickstart: .venv/installed
	@if [ -e runs/quickstart ]; then mv runs/quickstart "runs/quickstart-$$(date -r runs/quickstart +%Y%m%d-%H%M%S)"; fi
	$(PY) main.py --config recipes/quickstart.yaml --output_dir runs/quickstart
	$(PY) main.py --config recipes/quickstart.yaml --output_dir runs/quickstart --eval true --resume runs/quickstart/checkpoint-best-ema.pth

# Drawn scenes; results stay in runs/.
quickstart-segmentation quickstart-detection: .venv/installed
	$(PY) -m dense.$(@:quickstart-%=%) --config recipes/quickstart_$(@:quickstart-%=%).yaml --output_dir runs/$@-$$(date +%Y%m%d-%H%M%S)

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/pyright

test: .venv/installed lint
	$(PYTEST) -n $(JOBS) --dist worksteal -m "not slow"

test-all: .venv/installed test
	$(PYTEST) -m slow

# The oldest versions that requirements.txt allows, in an environment of their own (6 GB more). The stored numbers of
# tests/parity/test_same_numbers.py are those of one version, whose draws others do not repeat.
OLDEST := "torch==2.11.*" "torchvision==0.26.*" "timm==1.0.26"
test-oldest:
	@test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q --disable-pip-version-check -r requirements.txt -r requirements-dev.txt $(OLDEST)
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -q -n $(JOBS) --dist worksteal -m "not slow" tests/unit tests/parity/test_models.py tests/parity/test_trajectories.py

# On a machine with a GPU: what no other can show, then speed; ends in two tables (docs/GPU.md).
gpu: .venv/installed
	$(PY) -m pytest -q tests/gpu
	$(PY) -m benchmarks.gpu

soak: .venv/installed
	HORNET_SOAK=1 $(PYTEST) -m slow tests/soak

bench: .venv/installed
	$(PY) -m benchmarks all

# The published accuracies on your ImageNet; ARGS are options of main.py, or --dry_run true without any data.
verify-published: .venv/installed
	$(PY) -m tools.verify $(if $(DATA),--data_path $(DATA)) $(ARGS)

clean:
	rm -rf build .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
