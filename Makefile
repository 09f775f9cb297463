# Everything is installed into $(VENV) on first use, from Python >= 3.11 and pip's index; later runs find it there.
VENV ?= .venv
# Where `make demo-checkpoint` keeps its corpus and training state.
WORK ?= demo-work
# Options for pytest, as in ARGS="-k ctc".
ARGS ?=
PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11 python,$(shell \
	$(name) -c 'import sys, venv, ensurepip; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)))
LIBTPU := libtpu==0.0.52

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
# A file's tests go to one worker (conftest.py says which files share one). A worker that had to be killed is not replaced.
PYTEST := $(PY) -m pytest -n auto --maxprocesses=4 --dist=loadscope --no-loadscope-reorder --max-worker-restart=0
# Most of a test's time is compilation: LLVM's optimizations cost more of it than these models take to run. Parity and the
# slow tier compile as users do.
QUICK_COMPILATION := XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

.PHONY: demo test test-slow test-plan test-all soak lint types parity parity-forms notebooks demo-checkpoint clean

demo: $(VENV)/.package
	$(PY) samples/demo.py

# What a newcomer runs: minutes, and no Ray, TensorFlow, Jupyter or TPU compiler.
test: $(VENV)/.test
	$(QUICK_COMPILATION) $(PYTEST) $(ARGS)

# Processes that are killed, Ray, notebooks, packaging, the TPU compiler, the examples of the documentation, more random cases.
# Three workers, because some tests wait for processes.
test-slow: $(VENV)/.test-slow $(VENV)/.libtpu
	PYTEST_XDIST_AUTO_NUM_WORKERS=3 GRANITE_JAX_TESTS=ci $(PYTEST) tests/test_*.py tests/slow -m "slow or fuzz" --timeout=600 \
		-o faulthandler_timeout=660 $(ARGS)

# The command `plan` alone, with the TPU compiler.
test-plan: $(VENV)/.test $(VENV)/.libtpu
	$(PYTEST) tests/slow/test_compiled.py -m slow -k test_the_command --timeout=600 $(ARGS)

test-all: test test-slow

# By hand: 10,000 random cases an entry, hours of audio, further topologies.
soak: $(VENV)/.test-slow $(VENV)/.libtpu
	GRANITE_JAX_TESTS=soak $(PYTEST) tests/test_*.py tests/slow -m "soak or fuzz" --timeout=7200 \
		-o faulthandler_timeout=7260 $(ARGS)

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports

types: $(VENV)/.dev
	$(PY) -m pyright --pythonpath $(PY)

parity: $(VENV)/.parity
	$(PY) -m pytest tests/parity $(ARGS)

# Configurations that are newer than that oracle, in an environment of their own.
parity-forms:
	$(MAKE) .venv-forms/.parity-forms VENV=.venv-forms
	$(QUICK_COMPILATION) .venv-forms/bin/python -m pytest -n 2 tests/parity_forms $(ARGS)

# The notebooks from their scripts (REPOSITORY=owner/name: installing from there), and the README's picture.
notebooks: $(VENV)/.test-slow
	$(PY) colab/pairs.py $(if $(REPOSITORY),--repository $(REPOSITORY))
	$(PY) -m granite_jax.cli transcribe granite_jax/evaluation/heldout_clips/free-132.ogg --plot colab/overview.png

# Needs espeak-ng, flite, fortunes and wamerican (Debian packages), and hours.
demo-checkpoint: $(VENV)/.train
	$(PY) -m granite_jax.training.recipes.demo.recipe all $(WORK)

clean:
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer, with venv, is needed: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.package: pyproject.toml | $(VENV)/.created
	$(PIP) --editable .
	@touch $@

# The package with an extra.
$(VENV)/.test $(VENV)/.test-slow $(VENV)/.dev $(VENV)/.train $(VENV)/.parity-forms: $(VENV)/.%: pyproject.toml | $(VENV)/.created
	$(PIP) --editable '.[$*]'
	@touch $@

# The oracle's feature extractor is torchaudio's, whose builds are for other releases of torch: its Python part alone is used.
$(VENV)/.parity: pyproject.toml | $(VENV)/.created
	$(PIP) --editable '.[parity]'
	$(PIP) --no-deps torchaudio==2.11.0
	rm -f $(VENV)/lib/python3*/site-packages/torchaudio/lib/*.so
	@touch $@

# The TPU compiler, for tests/slow/test_compiled.py. Beside the packages, not among them, where every `import jax` would look for a
# TPU; --no-deps and --target leave the rest alone.
$(VENV)/.libtpu: | $(VENV)/.created
ifeq ($(shell uname -sm),Linux x86_64)
	$(PIP) --no-deps --target $(VENV)/libtpu $(LIBTPU)
endif
	@touch $@
