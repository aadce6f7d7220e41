# `make` alone lists what there is to do. Written for GNU make 3.81, which macOS has.

PYTHON ?= python3
BIN    := .venv/bin
READY  := .venv/.ready
BENCH  := .venv/.bench
# Processes run side by side, and their models are tiny: threads would only wait for each other
ONE    := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo distributed test test-cuda mutants notebooks readme docs bench bench-cuda quarto

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile

demo: $(READY) ## see the callbacks at work on real handwritten digits
	@$(BIN)/python examples/digits.py

distributed: $(READY) ## train on two processes of this machine
	@CUDA_VISIBLE_DEVICES= $(ONE) $(BIN)/python -W ignore -m torch.distributed.run --standalone --nproc-per-node 2 examples/distributed.py

test: $(READY) ## check everything: modules, notebooks, README, tests, workflows
	@echo '== What nbdev generates is current'
	@$(BIN)/python tools/check.py
	@echo '== Notebooks run'
	@$(ONE) $(BIN)/nbdev-test
	@echo '== Tests pass'
	@$(ONE) $(BIN)/python -m pytest -n auto --dist loadscope
	@echo '== Workflows are valid'
	@$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	@$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml
	@$(BIN)/zizmor --offline --quiet .

test-cuda: $(READY) ## check what needs a CUDA GPU
	@if $(BIN)/python -W ignore -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(BIN)/python -m pytest -m cuda && $(BIN)/nbdev-test --flags cuda; \
	else echo 'There is no CUDA GPU here: the tests and the cells marked cuda were skipped'; fi

mutants: $(READY) ## break lines on purpose, one at a time, and see which check fails (some: M='core data')
	@$(ONE) $(BIN)/python tools/mutants.py $(M)

notebooks: $(READY) ## export, run and clean the notebooks in place (one: NB=nbs/03_accumulation.ipynb)
	@$(BIN)/nbdev-export
	@$(ONE) $(BIN)/python tools/notebooks.py $(NB)

readme: $(READY) ## make README.md from nbs/index.ipynb, and nbs/llms.txt from all pages
	@$(BIN)/python tools/readme.py

docs: quarto $(READY) ## build the site into _docs (needs Quarto)
	@$(BIN)/python tools/build_site.py

bench: $(BENCH) ## measure beside fastai, Lightning, Accelerate and plain PyTorch, up to 30 minutes (a look: ARGS=--quick)
	@$(BIN)/python benchmarks/run.py $(ARGS)

bench-cuda: $(BENCH) ## the benchmarks for a GPU
	@$(BIN)/python benchmarks/run.py --cuda $(ARGS)

# nbdev would fetch Quarto itself, as root
quarto:
	@command -v quarto >/dev/null || { echo 'The site needs Quarto: https://quarto.org/docs/get-started' >&2; exit 1; }

# The stamp is written last: an interrupted set-up has none, and pip takes it up where it stopped.
$(READY): pyproject.toml settings.ini setup.py
	@command -v "$(PYTHON)" >/dev/null \
	  || { echo 'No $(PYTHON) here. Install Python 3.10 or newer, or name yours: make PYTHON=...' >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "$$("$(PYTHON)" --version) is too old. Name a 3.10 or newer: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo '$(PYTHON) has no venv module. On Debian and Ubuntu: sudo apt install python3-venv' >&2; exit 1; }
	@echo 'Setting up .venv, the environment of this project: about 6 GB from PyPI, 2 to 5 minutes'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

$(BENCH): $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@
