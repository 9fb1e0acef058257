# make run     install, then run the whole pipeline on a real small model, without a cluster
# make test    install, then run the tests
# make help    everything else

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
UV     := $(BIN)/uv
# uv reads its own configuration only: hand it pip's folder of wheels, where there is one.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
# INSTALLER=pip installs with plain pip, from the same pins.
INSTALLER ?= uv
UV_VERSION := 0.13.9

MODEL   ?=
PARAMETERS ?= examples/demonstration.yaml
DATA    ?=
STORAGE ?= runs
SET     ?=
SAMPLES ?= 352
IMAGE   ?=
TRAINING_IMAGE ?=
REPORT  ?=
SIZES   ?=
# Test processes side by side; each takes about 1.5 GB.
JOBS    ?= 2

.PHONY: help setup run rounds frontier test test-slow test-gpu test-cluster test-mlflow test-images test-report screenshot lint format compile check-compiled check-manifests bench bench-svd bench-data ui images sbom clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(VENV)/.complete ## Make the environment in .venv (does nothing if it is up to date)

# The stamp is written last: an interrupted installation is taken up again.
$(VENV)/.complete: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "Python 3.11 with venv is needed (PYTHON=$(PYTHON))" >&2; exit 1; }
ifeq ($(INSTALLER),uv)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@# pip compiles what it installs; otherwise each process would, where PYTHONDONTWRITEBYTECODE is set.
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(UV) pip install --compile-bytecode --constraint constraints.txt --editable '.[dev]'
else
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
endif
	@touch $@

run: setup ## Run the pipeline here: MODEL=… DATA=… STORAGE=… SET='num_epochs=2 seed=1' PARAMETERS=file.yaml
	$(BIN)/python -m pipelines.run_local $(if $(PARAMETERS),--parameters '$(PARAMETERS)') --storage '$(STORAGE)' $(if $(MODEL),--model '$(MODEL)') $(if $(DATA),--data '$(DATA)') $(foreach s,$(SET),--set '$(s)')

rounds: setup ## Run three rounds on three real tasks here, as a schedule would: STORAGE=… SAMPLES=352 SET='…'
	$(BIN)/python -m pipelines.run_rounds --storage '$(STORAGE)' --samples '$(SAMPLES)' $(foreach s,$(SET),--set '$(s)')

ui: setup ## Open MLflow on what `make run` left
	$(BIN)/mlflow ui --backend-store-uri sqlite:///$(abspath $(STORAGE))/mlflow/mlflow.db

test: setup ## Run the tests: JOBS=2 side by side
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-slow: setup ## Run the tests that `make test` leaves out: several nodes, many processes
	$(BIN)/python -m pytest -m slow -n $(JOBS) --dist loadfile --timeout=1800

test-gpu: setup ## Compare training on a CUDA GPU with training on the CPU
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	    $(BIN)/python -m pytest -m gpu tests/gpu; \
	else \
	    echo "test-gpu: skipped, torch sees no CUDA GPU here"; \
	fi

test-cluster: setup ## Run the training step on a stand-in cluster whose pods are real processes, and break it
	$(BIN)/python -m pytest -m cluster -n $(JOBS) --dist loadfile

test-mlflow: setup ## Run the tests against a real MLflow server on PostgreSQL (in Debian the package postgresql), and break it
	$(BIN)/python -m pytest -m mlflow_server

test-report: setup ## Open a report in a real browser, on a large and a small screen (needs Debian's chromium)
	@command -v "$${CHROMIUM:-chromium}" >/dev/null || { echo "test-report needs Chromium: the package chromium of Debian, or its program in CHROMIUM" >&2; exit 1; }
	$(BIN)/python -m pytest -m browser tests/evaluation

screenshot: setup ## Take the picture of a report for the README: REPORT=runs/rounds/…/report.html
	@test -n '$(REPORT)' || { echo "name the report: make screenshot REPORT=runs/rounds/…/report.html" >&2; exit 1; }
	$(BIN)/python -m docs.screenshot '$(REPORT)' docs/report.png --height 2150

lint: setup ## Check style, types and that the compiled YAML is current
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(MAKE) --no-print-directory check-compiled

format: setup ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

compile: setup ## Compile the pipeline to YAML and write the generated documents: IMAGE=registry/…@sha256:… TRAINING_IMAGE=… set its images, SCRATCH_SIZE=200Gi a scratch volume, STEP_LIMITS=cpu,memory limits of the steps
	$(if $(IMAGE),OSFT_IMAGE='$(IMAGE)') $(if $(TRAINING_IMAGE),OSFT_TRAINING_IMAGE='$(TRAINING_IMAGE)') $(if $(SCRATCH_SIZE),OSFT_SCRATCH_SIZE='$(SCRATCH_SIZE)') $(if $(STEP_LIMITS),OSFT_STEP_LIMITS='$(STEP_LIMITS)') $(BIN)/python -m pipelines.continual_learning.pipeline
	$(BIN)/python -m components.readme
	$(BIN)/python -m docs.generate

check-compiled: setup
	@$(BIN)/python -m pipelines.continual_learning.pipeline --check
	@$(BIN)/python -m components.readme --check
	@$(BIN)/python -m docs.generate --check

bench: setup $(VENV)/peers/.complete ## Measure a training step of ours, full fine-tuning, LoRA, PEFT's OSF and mini-trainer (a quarter of an hour)
	$(BIN)/python -m benchmarks.step

# mini-trainer, beside this project's own packages: without what it requires, which would change those.
$(VENV)/peers/.complete: benchmarks/peers.txt $(VENV)/.complete
	$(if $(filter uv,$(INSTALLER)),VIRTUAL_ENV=$(CURDIR)/$(VENV) $(UV) pip,$(BIN)/python -m pip) install --no-deps --target $(VENV)/peers --requirement benchmarks/peers.txt
	@touch $@

bench-data: setup ## Measure preparing, resolving, planning and evaluating 10,000 and 100,000 chats (minutes): SIZES=10000,100000,1000000
	$(BIN)/python -m benchmarks.data $(if $(SIZES),--sizes '$(SIZES)')

bench-svd: setup ## Measure what the split of a weight costs, anew and from the last round's (two minutes on a quiet core)
	$(BIN)/python -m benchmarks.svd

frontier: setup ## Measure what each method learns and how far the model drifts for it (hours on a CPU; resumes)
	$(BIN)/python -m benchmarks.frontier

images: ## Build the images with Docker, Podman or Buildah: TAG=… TRAINING_TAG=… BASE=… (images/README.md lists the settings)
	@images/build

sbom: ## Write what the images hold to dist/, as CycloneDX: TAG=… TRAINING_TAG=… as in `make images`
	@mkdir -p dist
	@for image in steps training; do \
	    images/run_inside $$image images/sbom.py osft-$$image > dist/$$image.part; \
	    mv dist/$$image.part dist/$$image.cdx.json; \
	done
	@ls -l dist/*.cdx.json

test-images: setup ## Build both images for CPUs and test them (as root; tests/images/run)
	@PYTHON=$(BIN)/python tests/images/run

check-manifests: setup ## Render the manifests with kubectl and check them against their schemas
	@command -v kubectl >/dev/null || { echo "check-manifests needs kubectl: the package kubernetes-client of Debian, or kubectl" >&2; exit 1; }
	$(BIN)/python -m pytest -m manifests tests/manifests

clean: ## Remove the environment and the caches, keep what runs made
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
