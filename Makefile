# `make` lists the targets. Targets that need Python first create .venv (see scripts/venv.sh), with
# the newest Python found or the one named by PYTHON: make test PYTHON=python3.12

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo serve test simulate check wheel format docs bench clean runtime server dev

python = .venv/bin/python

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

demo: runtime ## ask the embedded demo model a question: thinking, then the answer
	@unset QWEN3_MODEL; .venv/bin/qwen3 "What is 123 + 456?" </dev/null
	@echo
	@echo 'Next: .venv/bin/qwen3 chat, or make serve for the chat page in a browser.'
	@echo 'After source .venv/bin/activate it is just qwen3: qwen3 --model 8B "Why is the sky blue?"'

serve: server ## serve the demo model and open its chat page; ARGS="--model 8B --port 9000" is added
	@unset QWEN3_MODEL; .venv/bin/qwen3 serve --open $(ARGS)

test: dev ## run the tests, for minutes; ARGS="-k cache -x" is passed to pytest
	@$(if $(ARGS),:,echo 'This takes about five minutes on two cores; ARGS="-k cache" runs a part.')
	$(python) -m pytest $(ARGS)

simulate: dev ## run the tests as if on a Mac's GPU, computed on the CPU; ARGS as for test
	QWEN3_TEST_GPU=simulated $(python) -m pytest $(ARGS)

check: dev ## run all checks as CI does: format, lint, types, docs, tests with coverage
	$(python) -m ruff format --check .
	$(python) -m ruff check .
	$(python) -m mypy
	$(python) scripts/cli_docs.py --check docs/cli.md
	$(python) scripts/api_docs.py --check docs/api.md
	$(python) -m pytest --cov -m "not published and not slow and not browser"

wheel: ## test the wheel in bare venvs of the lowest and the newest Python found
	@scripts/check_wheel.sh

format: dev ## format the code and apply the linter's fixes
	$(python) -m ruff check --fix --exit-zero --quiet .
	$(python) -m ruff format .

docs: dev ## generate docs/cli.md from the command's --help, and docs/api.md from the docstrings
	$(python) scripts/cli_docs.py > docs/cli.md.new
	mv docs/cli.md.new docs/cli.md
	$(python) scripts/api_docs.py > docs/api.md.new
	mv docs/api.md.new docs/api.md

bench: dev ## compare with mlx-lm and update docs/benchmarks.md; ARGS="soak" runs a part
	$(python) -m benchmarks --write docs/benchmarks.md $(ARGS)

clean: ## remove .venv, caches and built files
	rm -rf .venv .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

runtime server dev:
	@scripts/venv.sh $@
