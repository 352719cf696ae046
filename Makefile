# The only commands that the README and CI use.
#   make demo          every task on the shipped pictures; results in out/demo (an environment of its own, without PyTorch)
#   make test          the test suite (makes .venv with everything)
#   make test-slow     what takes minutes or much memory
#   make check         format, lint, types, import rules
#   make format        put the format right
#   make bench         measure everything on this machine (hours; nothing else should run) and write the tables of the docs
#   make wheel         the wheel, demo model included, in dist
#   make real-weights  fetch MobileSAM and Flan-T5-small by hash into the cache, for the tests that want real weights, for
#                      training the demo and for exporting its checkpoint
#   make tabletop-glamm  the small GLaMM, which is not shipped: renders 10,000 scenes, trains (hours on two cores; goes on
#                      where it was stopped) and exports to models/tabletop-glamm, where deixis looks for it by name

PYTHON ?= python3
PIP = -m pip install --quiet --disable-pip-version-check -c constraints.txt

RESULTS = benchmarks/results

.PHONY: demo test test-slow check format bench wheel real-weights tabletop-glamm clean

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

bench: .venv/rivals
	mkdir -p out/bench
	.venv/bin/deixis bench models/tabletop --threads 2 --rounds 20 --json $(RESULTS)/bench-tabletop.json --html out/bench/tabletop.html
	.venv/bin/python -m deixis_bench.rivals --part text --json $(RESULTS)/rivals-text.json
	.venv/bin/python -m deixis_bench.rivals --part llama --json $(RESULTS)/rivals-llama.json
	.venv/bin/python -m deixis_bench.rivals --part encoder --json $(RESULTS)/rivals-encoder.json
	.venv/bin/python -m deixis_bench.decoder_step --json $(RESULTS)/decoder-step.json
	.venv/bin/python -m deixis_bench.serving models/tabletop --json $(RESULTS)/serving.json
	.venv/bin/python -m deixis_bench.soak models/tabletop --json $(RESULTS)/soak.json
	.venv/bin/deixis export --preset tabletop-glamm --random --out out/bench/tabletop-glamm --force
	.venv/bin/python -m deixis_bench.answer_length out/bench/tabletop-glamm --threads 1 --points 65 \
	    --json $(RESULTS)/tabletop-glamm-answer-length.json
	.venv/bin/python -m deixis_bench.tables

wheel: .venv/ready
	.venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

real-weights: .venv/ready
	.venv/bin/python -m deixis_train.loaders.real_weights

tabletop-glamm: real-weights
	.venv/bin/deixis train scenes --out out/scenes/train --seed 2000001 --count 10000
	.venv/bin/deixis train scenes --out out/scenes/val --seed 900001 --count 300
	.venv/bin/deixis train tabletop-glamm --data out/scenes --out out/runs/tabletop-glamm
	.venv/bin/deixis export out/runs/tabletop-glamm/checkpoint --out models/tabletop-glamm --precision fp16 --force

.venv-demo/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python $(PIP) -e '.[cpu]'
	touch $@

.venv/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) 'torch==2.13.0'
	.venv/bin/python $(PIP) -e '.[dev]'
	touch $@

.venv/rivals: .venv/ready
	.venv/bin/python $(PIP) -e '.[rivals]'
	touch $@

clean:
	rm -rf out build dist .venv-demo
