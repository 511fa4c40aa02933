# Needs Python 3.11 or newer, make and a package index; everything else comes from there.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo web test lint clean
.DEFAULT_GOAL := demo

$(BIN)/x2l: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q 'torch>=2.11,<2.14'
	$(BIN)/pip install -q -e .
	@touch $@

demo: $(BIN)/x2l  ## answers about two photos that scikit-learn ships
	$(BIN)/x2l demo

$(BIN)/uvicorn: $(BIN)/x2l
	$(BIN)/pip install -q -e '.[web]'
	@touch $@

web: $(BIN)/uvicorn  ## the chat page at http://127.0.0.1:8000/
	$(BIN)/x2l web

$(BIN)/pytest: $(BIN)/x2l
	$(BIN)/pip install -q -e '.[dev]'
	@touch $@

test: $(BIN)/pytest  ## everything that needs no GPU, in one go
	$(BIN)/pytest -m 'not gpu'

lint: $(BIN)/pytest
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf .venv
