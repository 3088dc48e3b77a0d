# Each target is one or two commands that can be typed by hand; README.md says how.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= 2.13.0

python  := $(VENV)/bin/python
pip     := $(python) -m pip install --quiet --disable-pip-version-check -c constraints.txt
sources := setup.py $(shell find csrc -type f)
cpp     := $(shell find csrc tests/cuda_on_host -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test bench lint wheel wheel-check asan tsan cuda-arches clean

demo: $(VENV)/.built
	$(python) -m resnet_fast demo

test: $(VENV)/.built
	$(python) -m pytest

bench: $(VENV)/.built
	$(pip) --no-build-isolation -e '.[peers]'
	$(python) -m resnet_fast bench resnet50 --batch 1,16
	$(python) -m resnet_fast bench resnet18 --batch 1,16

lint: $(VENV)/.built
	$(python) -m ruff check . && $(python) -m ruff format --check . && $(python) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(cpp)

wheel: $(VENV)/.built
	$(python) -m pip wheel --quiet --no-build-isolation --no-deps -w dist .

wheel-check: wheel
	.ci/wheel-check $(TORCH) $(python)

# The CPU library under AddressSanitizer, built beside the ordinary one: the op contract, the
# convolutions over packed weights, hostile arguments. Left out: what starts processes or counts
# the memory that is kept. Python leaks by design at exit, and its allocator would hide overruns; a
# captured report would be lost when the process ends on it.
asan: $(VENV)/.built
	RESNET_FAST_SANITIZE=address $(python) setup.py -q build_ext --inplace
	RESNET_FAST_SANITIZE=address ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc \
	  RESNET_FAST_EXAMPLES=10 \
	  LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so.6)" \
	  $(python) -m pytest --capture=sys tests/test_op_contract.py tests/test_conv_candidates.py tests/test_conv_bf16.py tests/test_conv_grouped.py tests/test_int8.py tests/test_sequence.py tests/test_sequence_ops.py tests/test_sequence_lists.py tests/test_sequence_stripes.py tests/test_sequence_pieces.py tests/test_errors.py \
	  -k 'not compile and not opcheck and not memory_is_kept and not lower_instruction and not without_the_library'

# The same library under ThreadSanitizer, on more threads than most machines that build have cores:
# networks as one call, convolutions shared between threads, two models in two threads. setarch
# switches the randomised addresses off that it cannot map.
tsan: $(VENV)/.built
	RESNET_FAST_SANITIZE=thread $(python) setup.py -q build_ext --inplace
	RESNET_FAST_SANITIZE=thread RESNET_FAST_TEST_THREADS=3 RESNET_FAST_EXAMPLES=10 \
	  TSAN_OPTIONS="exitcode=66 ignore_noninstrumented_modules=1 suppressions=tests/tsan.txt" \
	  LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libtsan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so.6)" \
	  setarch -R $(python) -m pytest --capture=sys tests/test_sequence.py tests/test_sequence_ops.py tests/test_sequence_lists.py tests/test_sequence_stripes.py tests/test_sequence_pieces.py tests/test_dropin.py tests/test_conv_candidates.py tests/test_conv_bf16.py tests/test_conv_grouped.py tests/test_int8.py \
	  -k '(test_sequence_ or thread or test_shapes) and not compile and not opcheck and not memory_is_kept and not lower_instruction and not without_the_library'

# The CUDA sources for every architecture there is code for, warnings being errors as in any build,
# and what nvcc made of them there. Needs nvcc 12.8 or later, but no GPU.
cuda-arches: $(VENV)/.built
	RESNET_FAST_CUDA=all $(python) setup.py -q build_ext --inplace
	RESNET_FAST_CUDA=all $(python) -m pytest tests/test_cuda_resources.py tests/test_cuda_build.py

clean:
	rm -rf build dist *.egg-info resnet_fast/*.so $(VENV)/.built

# pip sees only what changed: dependencies by pyproject.toml, objects by ninja.
$(VENV)/.deps: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(pip) pip setuptools wheel ninja pybind11 torch torchvision
	touch $@

$(VENV)/.built: $(VENV)/.deps $(sources)
	$(pip) --no-build-isolation -e '.[test,dev]'
	touch $@
