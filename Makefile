# Needs Python 3.11 or newer, make and a package index; everything else comes from there.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo web train reproduce test harness lint clean
.DEFAULT_GOAL := demo

$(BIN)/x2l: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q 'torch>=2.11,<2.14'
	$(BIN)/pip install -q -e .
	@touch $@

demo: $(BIN)/x2l  ## answers about four photos that scikit-learn and scikit-image ship
	$(BIN)/x2l demo

$(BIN)/uvicorn: $(BIN)/x2l
	$(BIN)/pip install -q -e '.[web]'
	@touch $@

web: $(BIN)/uvicorn  ## the chat page at http://127.0.0.1:8000/
	$(BIN)/x2l web

DATA ?= ../shared/data

data/.linked: $(BIN)/x2l
	mkdir -p data
	ln -sfn $(abspath $(DATA))/* data/
	@touch $@

data/spoken_questions/held_out-0000.tar: data/.linked
	$(BIN)/pip install -q -e '.[data]'
	$(BIN)/x2l data questions data/spoken_questions

data/vsdial-mini/README.md: data/.linked
	$(BIN)/pip install -q -e '.[data]'
	$(BIN)/x2l data make vsdial-mini --data-root data --out data/vsdial-mini

data/xllm-instruct-mini/README.md: data/vsdial-mini/README.md
	$(BIN)/x2l data make xllm-instruct-mini --data-root data --vsdial data/vsdial-mini --out data/xllm-instruct-mini

train: data/spoken_questions/held_out-0000.tar data/xllm-instruct-mini/README.md  ## all stages; then: x2l chat --model runs/tiny/all
	$(BIN)/x2l train tiny/all data_root=data

reproduce: train  ## the paper's findings, SCALE=small (or smoke, medium, full)
	$(BIN)/x2l reproduce data --scale $(or $(SCALE),small)

$(BIN)/pytest: $(BIN)/x2l
	$(BIN)/pip install -q -e '.[dev]'
	@touch $@

test: $(BIN)/pytest  ## everything that needs no GPU, in one go
	$(BIN)/pytest -m 'not gpu'

.venv-harness/installed: tests/harness.txt $(BIN)/pytest
	$(BIN)/python -m venv --clear .venv-harness
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
		> $$(.venv-harness/bin/python -c 'import site; print(site.getsitepackages()[0])')/x2l.pth
	.venv-harness/bin/pip install -q --no-deps lmms-eval==0.7.3 lm-eval==0.4.13
	.venv-harness/bin/pip install -q --no-warn-conflicts -r tests/harness.txt
	@touch $@

harness: .venv-harness/installed  ## our models through the unmodified lmms-eval and lm-eval, on local tasks
	X2L_HARNESS=1 .venv-harness/bin/python -m pytest tests/test_eval_harness.py -m slow

lint: $(BIN)/pytest
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf .venv .venv-harness
