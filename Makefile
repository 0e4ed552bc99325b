# make run: the chat page with the bundled model.   make test: everything on this machine.   make help: the rest.
#
# Settings: PYTHON=python3.12  VENV=.venv  PIP_ARGS="--extra-index-url URL"  ARGS="--port 8000"  PYTEST_ARGS="-k cli -x"
# For `make checkpoints`: GPUS=2  NANO=runs/nano  DATA="--photos FOLDER --text FOLDER"  BASE=FILE.gguf  DRAWN=FILE.jsonl
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=
PYTEST_ARGS ?=
GPUS ?= 1
NANO ?= runs/nano
BASE ?= HuggingFaceTB/SmolLM2-135M-Instruct
DRAWN ?= data/drawn.jsonl
DATA ?= --photos data/photos --text data/text --data icons=data/icons.tar.gz --data fonts=data/fonts.tar.gz

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PACKAGES := $(foreach p,app benchmarks distill mmmamba quantize,$(if $(wildcard $(p)/*.py),$(p)))
CODE := app.py $(PACKAGES) docs tests

.DEFAULT_GOAL := help
.PHONY: help run test lint typecheck format bench data checkpoints clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

run: $(VENV)/.installed ## install once, then open the chat page
	$(BIN)/python app.py --open $(ARGS)

test: $(VENV)/.installed-dev $(VENV)/.installed-browser ## install once, then run all tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev ## style and common mistakes (ruff)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

typecheck: $(VENV)/.installed-dev ## types (mypy)
	$(BIN)/mypy $(PACKAGES:%=-p %)

format: $(VENV)/.installed-dev ## rewrite in the project's style
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

bench: $(VENV)/.installed ## latency and memory over context length, on the CPU
	$(BIN)/python -m benchmarks.decode --device cpu $(ARGS)

data: $(VENV)/.installed-dev ## build the training data in data/ from its sources; ARGS="--from FOLDER" for what is not fetched
	$(BIN)/python -m distill.data.build data $(ARGS)

# The recipes bound every stage by minutes: more cards see more data in them, not the same in less time.
TRAIN = $(BIN)/accelerate launch $(if $(filter 1,$(GPUS)),,--multi_gpu) --num_machines 1 --num_processes $(GPUS) \
	--mixed_precision no --dynamo_backend no -m distill
READ = --tokenizer checkpoints/nano --graph $(DATA) $(ARGS)
WITH = --base $(BASE) $(READ)
# The last stage once more, of the student KIND in FOLDER: $(call MORE,KIND,FOLDER).
MORE_OF = --recipe nano-$(1)-more --teacher $(NANO)/teacher --out $(NANO)/more-$(1)
define MORE
	$(BIN)/python -m distill convert $(MORE_OF) --student $(2)
	$(TRAIN) stage3 $(MORE_OF) --data drawn=$(DRAWN) $(READ)
	$(BIN)/python -m distill export $(MORE_OF)
endef

checkpoints: $(VENV)/.installed-dev $(DRAWN) ## train nano again, from nothing, on GPUS=1 or more; goes on where it was stopped
	@echo "78 minutes of training by the recipes' limits; loading, compiling and scoring come on top"
	$(TRAIN) teacher --recipe nano-look --out $(NANO)/look $(WITH)
	$(TRAIN) teacher --recipe nano-read --resume $(NANO)/look --out $(NANO)/read $(WITH)
	$(TRAIN) teacher --recipe nano-all --resume $(NANO)/read --out $(NANO)/all $(WITH)
	$(TRAIN) run --recipe nano-linear --resume $(NANO)/all --out $(NANO) --data drawn=$(DRAWN) $(WITH)
	$(TRAIN) run --recipe nano-hybrid --teacher $(NANO)/teacher --layers-from $(NANO) --out $(NANO)/hybrid --data drawn=$(DRAWN) $(WITH)
	$(call MORE,linear,$(NANO))
	$(call MORE,hybrid,$(NANO)/hybrid)
	$(BIN)/python -m distill bundle checkpoints/nano teacher=$(NANO)/teacher linear=$(NANO)/more-linear \
	  hybrid=$(NANO)/more-hybrid

$(DRAWN): | $(VENV)/.installed-dev
	@mkdir -p $(@D)
	$(BIN)/python -m distill.sample_text $@.part --base $(BASE) --tokenizer checkpoints/nano --count 20000
	@mv $@.part $@

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info

# The stamps make a second run start at once; they are older than the lists of packages after a change of those.
$(VENV)/pyvenv.cfg:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "$(PYTHON) is not on PATH; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is $$("$(PYTHON)" -V 2>&1); Python 3.11 or newer is needed: make PYTHON=python3.12" >&2; exit 2; }
	@"$(PYTHON)" -m venv "$(VENV)" || { rm -rf "$(VENV)"; \
	  echo "$(PYTHON) cannot make virtual environments; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 2; }

$(VENV)/.installed: requirements.txt constraints.txt | $(VENV)/pyvenv.cfg
	$(PIP) install $(PIP_ARGS) -r requirements.txt -c constraints.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements-distill.txt $(VENV)/.installed
	$(PIP) install $(PIP_ARGS) -r requirements-dev.txt -r requirements-distill.txt -c constraints.txt
	@touch $@

# Without a browser the tests that need one are skipped and say so; under CI=true that is a failure.
$(VENV)/.installed-browser: .ci/browser $(VENV)/.installed-dev
	@if bash .ci/browser "$(BIN)"; then touch $@; elif [ "$(CI)" = true ]; then exit 1; \
	else echo "The browser tests will be skipped." >&2; fi
