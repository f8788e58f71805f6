# Two commands matter: `make demo` and `make test`. Both create .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: test demo lint bench gpu clean

# torch first, and pinned: see constraints-cpu.txt.
$(STAMP): pyproject.toml constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch==2.13.0" numpy
	$(BIN)/python -m pip install --quiet -c constraints-cpu.txt -e ".[dev]"
	touch $@

$(VENV)/.demo: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints-cpu.txt -e ".[demo]"
	touch $@

$(VENV)/.bench: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints-cpu.txt -e ".[bench,demo]"
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 tests

demo: $(VENV)/.demo
	$(BIN)/python -m bench.demo

bench: $(VENV)/.bench
	$(BIN)/python -m bench.coverage
	$(BIN)/python -m bench.cpu_peers
	$(BIN)/python -m bench.tokens

# On a machine with a GPU and PyTorch, where nothing can be installed: the system's Python, as it is. PART=attention runs
# one part, OUT=folder names where records go, MINUTES=25 gives more than eight; a run that was cut off goes on where it
# stopped.
gpu:
	$(PYTHON) -m bench.gpu --out $(or $(OUT),bench/results) $(if $(PART),--part $(PART)) $(if $(MINUTES),--minutes $(MINUTES))

clean:
	rm -rf $(VENV) build dist *.egg-info
