# make optimize    sets up .venv when it is missing, then runs the main job: make optimize ARGS="recipe.toml --json"
# make test        sets up .venv when it is missing, then lints, checks types and runs the tests
# make env         only sets up .venv
#
# PYTHON=python3.12       the interpreter .venv is made with (3.11 or newer)
# EXTRAS=cpu,dev          what is installed beside the core; `gpu` takes the place of `cpu` where there is an NVIDIA driver
# PIP_FLAGS="…"           handed to pip. On Linux PyPI's torch brings CUDA along; without a GPU this saves gigabytes:
#                         PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

.ONESHELL:
.SHELLFLAGS := -euc
.PHONY: env optimize lint test

PYTHON ?= python3
EXTRAS ?= $(if $(shell command -v nvidia-smi),gpu,cpu),dev
PIP_FLAGS ?=
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt
# Only the default is looked for under other names; a PYTHON that was given is used or refused.
PYTHONS := $(PYTHON) $(if $(filter file,$(origin PYTHON)),python3.13 python3.12 python3.11)

env: .venv/complete

# An install that was killed leaves .venv/unfinished behind, and is begun again from nothing: pip would take a package that
# is half there for installed. One that pip itself gave up changed nothing, and is simply tried again.
.venv/complete: pyproject.toml constraints.txt
	@exec 9< Makefile; flock 9  # a second make waits here, and then has nothing left to do
	if [ $@ -nt pyproject.toml ] && [ $@ -nt constraints.txt ]; then exit 0; fi
	if [ -e .venv/unfinished ] || ! $(BIN)/python -m pip --version > /dev/null 2>&1; then
		for python in $(PYTHONS); do
			if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then found=$$python; break; fi
		done
		if [ -z "$${found:-}" ]; then
			echo "Python 3.11 or newer is needed, and none of these is one: $(PYTHONS). Name yours: make PYTHON=/path/to/python3.12" >&2
			exit 1
		fi
		echo "Creating .venv with $$("$$found" --version). Installing takes some minutes the first time."
		"$$found" -m venv --clear .venv
	fi
	touch .venv/unfinished
	# torch first and exactly; with it the build back-end at its pinned version, which isolation would fetch unpinned.
	if $(PIP) torch==2.13.0 hatchling editables && $(PIP) --no-build-isolation -e '.[$(EXTRAS)]'; then
		rm .venv/unfinished
		touch $@
	else
		rm .venv/unfinished
		exit 1
	fi

optimize: env
	@$(BIN)/numprune optimize $(ARGS)

lint: env
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	@$(BIN)/pytest $(ARGS)
