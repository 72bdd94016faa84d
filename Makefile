# make demo   the main job on a bundled checkpoint
# make test   lint, types and tests
# make experiments   what the paper claims, on real data: every table and picture anew, in a quarter of an hour
# Both set everything up first; only Python 3.11 or newer and a network are needed.

PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3))
BIN := $(CURDIR)/.venv/bin
INSTALLED := .venv/installed

.PHONY: demo test lint types unit coverage package-test page-test docs commands device-test torture fuzz interruption repeatability zoo published install fixtures benchmark experiments open-questions clean

demo: install
	@rm -rf build/demo && mkdir -p build/demo && cp fixtures/digits-resnet8.pt build/demo/ckpt.pt
	@cd build/demo && PATH="$(BIN):$$PATH" && for line in \
		"onnx ckpt.pt --bits 8" \
		"tflite" \
		"verify --bits 2,4,6" \
		"verify --bits all --data ../../fixtures/digits-test.npz"; \
	do echo "\$$ tqexport $$line"; tqexport $$line || exit $$?; echo; done

test: lint types unit

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy tqexport cli

# A worker for each of two cores, with one thread each.
unit: install
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2

# How many branches of tqexport/ the tests take, which is slower than the tests themselves.
coverage: install
	$(BIN)/pytest --numprocesses 2 --cov

# Wheel and sdist, installed into empty environments, and the programs in JavaScript and C++. Needs a network; says what
# is absent.
package-test: install
	$(BIN)/pytest tests/installation tests/test_docs.py -m package -rs

# The page of tqexport page and the program for LiteRT.js in Chromium, and verify in Node. Needs a network, npm and Chromium; says what is absent.
page-test: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[page-test]'
	$(BIN)/pytest tests/page -m package -rs

# The documentation, into build/site; a warning is an error. The links have the pages under their paths in the repository.
PAGES := README.md CHANGELOG.md CITATION.cff CONTRIBUTING.md SECURITY.md CODE_OF_CONDUCT.md docs benchmarks cli experiments tests tqexport
docs: install
	@rm -rf build/pages && mkdir -p build/pages
	@for name in $(PAGES); do ln -s "$(CURDIR)/$$name" build/pages/$$name; done
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# The command reference anew, with the examples as they print now.
commands: install
	$(BIN)/python docs/make_commands.py

# The emitted C on an emulated Cortex-M4; says what to install where the tools are absent.
device-test: install
	$(BIN)/pytest tests/backends/c/test_device.py -rs

# Files changed and rewritten at random: verify must fail the ones and pass the others. Half an hour.
torture: install
	$(BIN)/python tests/torture.py

# Every command killed, interrupted and out of disk at random moments. Half an hour.
interruption: install
	$(BIN)/python tests/interruption/run.py

# The same bytes from one and two threads, any hash seed, any folder, any instruction set. A quarter of an hour.
repeatability: install
	$(BIN)/python tests/repeatability.py

# Every kind of network there is a small one of: trained a little, exported, verified; writes docs/zoo.md. Ten minutes.
zoo: install
	$(BIN)/python tests/zoo/run.py

# The same of networks that torchvision, timm and transformers publish; writes docs/published.md. Half an hour.
published: install
	$(BIN)/pip install --quiet --constraint constraints.txt timm==1.0.31 torchvision==0.28.0 transformers==5.24.0
	$(BIN)/python tests/zoo/run.py --published

# Hostile inputs for every reader, ten thousand of them: half an hour. FUZZ="--seed 10000 --count 2000" chooses others.
FUZZ ?= --count 10000
fuzz: install
	$(BIN)/python tests/fuzz/run.py $(FUZZ)

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Setting up .venv; the first time this takes a few minutes."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

fixtures: install
	$(BIN)/python fixtures/train_digits.py

benchmark: install
	$(BIN)/python benchmarks/main_job.py

experiments: install
	@for name in dummy_tensor convergence robustness storage tables; do \
		$(BIN)/python -m experiments.$$name || exit $$?; \
	done

open-questions: install
	$(BIN)/python -m experiments.integers
	$(BIN)/python -m experiments.open_questions
	$(BIN)/python -m experiments.learned_ranges
	$(BIN)/python -m experiments.tables

clean:
	rm -rf .venv build *.egg-info
