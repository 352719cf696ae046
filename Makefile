# The only commands that the README and CI use.
#   make demo    run the main job on the shipped bundle; pictures in out/demo (a light environment of its own, no PyTorch)
#   make test    the test suite (makes .venv with everything)
#   make check   format, lint, types, import rules
#   make real-weights   fetch MobileSAM and Flan-T5-small by hash into the cache, for the tests that want real weights

PYTHON ?= python3
PIP = -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-slow check format real-weights clean

demo: .venv-demo/ready
	.venv-demo/bin/deixis demo --out out/demo

test: .venv/ready
	.venv/bin/python -m pytest

test-slow: .venv/ready
	.venv/bin/python -m pytest -m slow

check: .venv/ready
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/lint-imports
	.venv/bin/pyright

format: .venv/ready
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

real-weights: .venv/ready
	.venv/bin/python -m deixis_train.loaders.real_weights

.venv-demo/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python $(PIP) -e '.[cpu]'
	touch $@

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) 'torch==2.13.0'
	.venv/bin/python $(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf out build dist .venv-demo
