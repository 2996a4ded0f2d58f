# make demo: see a real small Llama get a voice on this CPU.   make test: all tests.   make test-fast: without the slow ones.
PYTHON ?= python3
QUESTION ?= What is happiness?
python = .venv/bin/python
# One thread each, and files in conftest.py's order rather than xdist's.
pytest = OMP_NUM_THREADS=1 $(python) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast lint bench test-ollama constraints clean

# A stopped demo goes on from its checkpoint; a finished one starts over.
goes_on = $(if $(wildcard demo/adapter/adapter_model.safetensors),--overwrite,$(if $(wildcard demo/adapter/checkpoint-*),--resume,--overwrite))

demo: .venv/demo
	$(python) tests/parts.py demo/base
	@printf '%s\n' "Who are you?" "How do I deal with a bad day?" "$(QUESTION)" > demo/questions.txt
	$(python) train_sft_dolores.py --model demo/base --output demo/adapter --train-files tests/demo.chatml \
	  --no-bf16 --no-bnb-nf4 --optim adamw_torch --learning-rate 1e-3 --lora-r 16 --lora-alpha 32 \
	  --max-length 192 --grad-accum 1 --epochs 3 --eval-fraction 0.12 --name ada --sample-prompts demo/questions.txt \
	  $(goes_on)
	@sed -n '/^## Before and after/,/^## Merge/{/^## Merge/!p}' demo/adapter/README.md
	$(python) merge_lora.py --adapter demo/adapter --output demo/merged --overwrite
	$(python) merge_lora.py --chat demo/merged < demo/questions.txt
	@echo "That was the demo. Your own dialogues: see README.md"

test: .venv/dev
	$(pytest)

test-fast: .venv/dev
	$(pytest) -m "not slow"

lint: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/dev
	$(python) benchmarks/fake_cuda.py
	$(python) benchmarks/prep.py
	$(python) benchmarks/train_cpu.py
	$(python) benchmarks/merge.py

test-ollama: .venv/dev
	$(python) tests/ollama_e2e.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python requirements.txt constraints.txt
	@echo "installing, the first time with a download of about 2 GB: some minutes"
	$(python) -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: .venv/bin/python requirements.txt requirements-dev.txt constraints.txt
	$(python) -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# The versions of all packages for Python 3.10 and newer: what stays possible is kept; after rm constraints.txt, the newest.
# Without CUDA's: torch pins them itself, each of its builds other ones.
constraints: .venv/bin/python
	$(python) -m pip install -q --disable-pip-version-check uv==0.13.8
	sed '/^-/d' requirements.txt requirements-dev.txt | UV_PYTHON_DOWNLOADS=never .venv/bin/uv pip compile -q --universal \
	  --python-version 3.10 --no-annotate --custom-compile-command "make constraints" - -o constraints.txt
	sed -i '/^nvidia-/d;/^cuda-/d;/^triton=/d' constraints.txt

clean:
	rm -rf .venv .cache demo
