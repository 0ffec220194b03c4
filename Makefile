# Needs Python >= 3.10 with its venv module, and make. Everything else is installed into .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The order of tests, what hypothesis draws and the order of sets follow from a seed: two of them, since a suite runs twice.
# Each run prints its own; others: make test SEEDS="3 4".
SEEDS ?= 1 2
seeded = PYTHONHASHSEED=$(word $(1),$(SEEDS)) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal \
	--randomly-seed=$(word $(1),$(SEEDS))
# What names its engine in every test, or has none.
ENGINE_NAMED := tests/jacobian tests/replacements tests/test_network.py tests/test_docs.py tests/test_peak_memory.py tests/test_readme.py
# Small versions of the notebooks are run by themselves: make notebooks QUICK=1
NOTEBOOKS := tests/test_notebooks.py

# Bytecode is written where a module is imported, so that the next process need not compile anew; not of all that is installed.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-engines test-cuda test-versions test-peers fuzz lint notebooks benchmark docs clean

demo: $(VENV)/.demo
	$(BIN)/python notebooks/adaptation.py

# Without --engine, the engine is the structured one.
test: $(VENV)/.test
	$(MAKE) --jobs 2 --output-sync lint docs
	$(call seeded,1) --ignore $(NOTEBOOKS) --sample
	$(call seeded,2) --ignore $(NOTEBOOKS) $(ENGINE_NAMED:%=--ignore %) --engine autodiff --sample

# Every test there is, with each Jacobian engine forced in turn.
test-engines: $(VENV)/.test
	$(call seeded,1) --ignore $(NOTEBOOKS) $(ENGINE_NAMED:%=--ignore %) --engine structured
	$(call seeded,2) --ignore $(NOTEBOOKS) $(ENGINE_NAMED:%=--ignore %) --engine autodiff

# On a GPU; what is about the CPU is left out. One process: they would share the GPU's memory. Without a GPU all is skipped.
test-cuda: $(VENV)/.test
	$(BIN)/python -m pytest --device cuda --randomly-seed=$(firstword $(SEEDS))

# On the oldest and the newest versions that pyproject.toml allows, each in an environment of its own in build/versions.
test-versions:
	$(PYTHON) -m tests.versions

# Beside other packages, each in an environment of its own, which is made where there is none: .venv-peers-NAME.
test-peers: $(VENV)/.test
	$(BIN)/python -m benchmarks.peers setup neural_tangents torch
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/peers

# Random networks, each in every operation: make fuzz SECONDS=600 SEED=1000
SECONDS ?= 300
SEED ?= 0
fuzz: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --seconds $(SECONDS) --seed $(SEED)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Executes the notebooks and writes their outputs into them; with QUICK=1, tests small versions that leave no trace.
notebooks: $(VENV)/$(if $(QUICK),.test,.notebooks)
	$(if $(QUICK),$(call seeded,1) $(NOTEBOOKS),$(BIN)/python notebooks/execute.py)

benchmark: $(VENV)/.test
	$(BIN)/python -m benchmarks.run

# What the tests need has it all.
docs: $(VENV)/$(if $(wildcard $(VENV)/.test),.test,.docs)
	$(BIN)/python -m sphinx -q -W -n -E -b html docs build/docs

clean:
	rm -rf $(VENV) build dist output .pytest_cache .mypy_cache .ruff_cache .hypothesis

# .venv/.NAME says that the package is installed there with the extra NAME.
$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e ".[$*]"
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
