# Needs Python 3.11 or newer and make; every target sets up .venv by itself when something it stands on has changed.

# The first of these that runs and is new enough; or say make PYTHON=/path/to/python3.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
# A hundred processes of the tests would otherwise compile all modules again.
unexport PYTHONDONTWRITEBYTECODE
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
QUANTIZED_PIP := .venv-quantized/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt
PACKAGES := core plugins examples
SECONDS := 300

.PHONY: help demo test serve-test scale-test combinations models quantized numerics gpu gpu-record faults lint bench docs
.PHONY: audit fuzz
.DEFAULT_GOAL := help

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 19

demo: .venv/installed ## Fine-tune the tiny 4-bit base that ships with Budwood, and see that it learned (4 minutes)
	@$(BIN)/budwood demo --overwrite

test: .venv/installed ## Run the tests
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

serve-test: .venv/installed-browser ## Run the tests of a real server: streams, signals, hostile clients, a browser
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m serve tests/serve

scale-test: .venv/installed ## Run the tests of four processes, of two machines, and of their faults (at most 30 minutes)
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m scale tests/scale $(PROCESSES)

combinations: .venv/installed ## Train every combination of objective, adapter, adversary, teacher and quantisation
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.plugins.combinations
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.plugins.peft_methods.methods

models: .venv/installed ## Train on a tiny model of every architecture beside stock PEFT (5 to 10 minutes)
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.models

quantized: .venv-quantized/installed ## Compare GPTQ and HQQ with the libraries that made them, in an environment of its own (4 minutes)
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-quantized/bin/python -m tests.plugins.quantized.peers

# Files with long tests of several processes among others.
PROCESSES := tests/core/training/test_on_policy.py tests/core/training/test_step_terms.py tests/plugins/adversarial

# Files whose bounds come from arithmetic; both settings choose other kernels in torch, oneDNN and MKL. On a processor
# with AMX, torch asks oneDNN whether its attention may use it, whatever its own setting says.
NUMERICAL := tests/core/model tests/core/adapters \
	tests/core/serving/test_engine_adapters.py tests/core/serving/test_engine_requests.py \
	tests/core/training/test_sequence_terms.py tests/core/training/test_step_terms.py tests/core/training/test_step.py \
	tests/plugins/preference/test_equations.py tests/plugins/grpo/test_losses.py \
	tests/plugins/adversarial/test_equations.py tests/plugins/adversarial/test_divergence.py \
	tests/plugins/distillation/test_divergence.py tests/plugins/peft_methods/test_methods_as_in_peft.py \
	tests/plugins/regularisation tests/plugins/test_together.py \
	tests/plugins/adalora/test_adapter.py tests/plugins/adalora/test_run.py tests/e2e/test_commands.py
LOWERED := "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2" "ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=COMPATIBLE"

numerics: .venv/installed ## Run the numerical tests with the kernels of older processors, and those of compiled ops
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m compiled tests/core/training/test_compilation.py
	@for setting in $(LOWERED); do echo "$$setting"; env $$setting HF_HUB_OFFLINE=1 \
		$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(NUMERICAL) || exit 1; done

gpu: .venv/installed ## Run the tests that need an NVIDIA GPU, on the first one
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu

gpu-record: .venv/installed-bench ## Measure speed on the first NVIDIA GPU, stage by stage (10 minutes)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.gpu_record

faults: .venv/installed ## Kill, fill the disk, damage files, run out of memory: what is lost? (25 to 35 minutes)
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= $(BIN)/python -m tests.faults
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m scale tests/scale/test_faults.py

lint: .venv/installed ## Check formatting, rules, types, and who imports whom
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy core
	@$(BIN)/lint-imports

bench: .venv/installed-bench ## Measure training side by side with Trainer + PEFT and TRL
	@HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.train
	@HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.train --size 160m --arms budwood trainer-1 trainer-8 --rounds 2 --steps 1
	@HF_HUB_OFFLINE=1 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m benchmarks.train \
		--precision fp32 --arms budwood trainer-1 trainer-8 --rounds 2 --steps 1
	@HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.hooks
	@HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.adalora
	@HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.adalora --initial-rank 64 --target-rank 16 --no-peft
	@HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.adversarial
	@HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.checkpoint
	@HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.data
	@HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.scale
	@HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.serve
	@$(BIN)/python -m benchmarks.real --quick

audit: .venv/installed-audit ## Look the pinned versions up in a database of known vulnerabilities (needs a network)
	@$(BIN)/python -m tests.hostile.audit

fuzz: .venv/installed-fuzz ## Fuzz the parsers, guided by coverage, for SECONDS (300) in all
	@$(BIN)/python -m tests.hostile.fuzz --seconds $(SECONDS)

docs: .venv/installed ## Write the generated pages: docs/recipe.md, hooks.md, data.md
	@$(BIN)/python docs/make_recipe_page.py > docs/recipe.md
	@$(BIN)/python docs/make_hooks_page.py > docs/hooks.md
	@$(BIN)/python docs/make_data_page.py > docs/data.md

.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Setting up .venv with $(PYTHON); the first time takes some minutes:"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "  torch"
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@echo "  budwood, what it needs, and its tools"
	@$(PIP) -e '.[dev]'
	@touch $@

# gptqmodel asks for a newer torch than constraints.txt has; what it uses of torch here is in both.
.venv-quantized/installed: pyproject.toml constraints.txt
	@echo "Setting up .venv-quantized:"
	@test -x .venv-quantized/bin/python || $(PYTHON) -m venv .venv-quantized
	@$(QUANTIZED_PIP) "$$(grep '^torch==' constraints.txt)"
	@DISABLE_CUDA=1 $(QUANTIZED_PIP) -e . pytest torchao optimum==2.3.0 hqq==0.2.8.post1 device-smi==0.5.7 pypcre==0.6.4 \
		tokenicer==0.0.14 logbar==0.4.15 threadpoolctl defuser==0.0.28 requests
	@$(QUANTIZED_PIP) --no-deps gptqmodel==7.7.0
	@touch $@

.venv/installed-bench: .venv/installed
	@echo "  what the benchmark compares with"
	@$(PIP) -e '.[bench]'
	@touch $@

.venv/installed-audit: .venv/installed
	@$(PIP) -e '.[audit]'
	@touch $@

.venv/installed-fuzz: .venv/installed
	@$(PIP) -e '.[fuzz]'
	@touch $@

.venv/installed-browser: .venv/installed
	@$(PIP) -e '.[browser]'
	@touch $@
