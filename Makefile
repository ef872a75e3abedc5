# The same commands on a laptop, in CI and on a machine with a GPU. Paths are relative, so the checkout may lie in a folder with spaces.
SHELL := bash
PYTHON ?= python3
PY := .venv/bin/python
# Python compiles what is imported when it is; pip would compile all of transformers.
INSTALL := $(PY) -m pip install --disable-pip-version-check --quiet --no-compile -c constraints.txt

# OpenMP's threads spin while they wait by default, which is many times slower as soon as another process wants the cores.
export OMP_WAIT_POLICY := passive

.PHONY: demo test check verify docs install clean

demo: .venv/core.stamp ## fine-tune the shipped Stable Diffusion pipeline (or go on with it), and print where the report is
	$(PY) -m diffalign train pipelines/demo.yaml resume_from_checkpoint=latest

test: .venv/dev.stamp ## all tests, offline
	OMP_NUM_THREADS=1 $(PY) -m pytest -m 'not verify' -n 2 --dist loadfile --durations 10 $(ARGS)

check: .venv/dev.stamp ## lint, format, types of the maths and of the recipes, floors
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright
	$(PY) -m pytest -q tests/test_floors.py

verify: check test demo ## everything above, and the tests that take minutes
	OMP_NUM_THREADS=1 $(PY) -m pytest -m verify --durations 0

docs: .venv/docs.stamp ## the documentation, into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

install: .venv/core.stamp ## the virtual environment in .venv, without the tools for development

clean: ## remove the virtual environment and the runs of the demo
	rm -rf .venv runs

# The environment is made once, and brought up to date when the requirements change.
.venv/core.stamp: pyproject.toml constraints.txt hatch_build.py
	test -x $(PY) || $(PYTHON) -m venv .venv
	@echo "Installing into .venv; a minute or two, most of it torch."
	$(INSTALL) -e .
	touch $@

# open_clip needs torchvision, whose wheel beside a CPU torch breaks a plain `import diffusers` (diffalign/_compat.py). The
# tests that read our CLIP with it find both in a folder of their own.
.venv/dev.stamp: .venv/core.stamp
	$(INSTALL) -e '.[dev]'
	rm -rf .venv/open_clip
	$(INSTALL) --no-deps --target .venv/open_clip open_clip_torch timm torchvision ftfy wcwidth
	touch $@

.venv/docs.stamp: .venv/core.stamp
	$(INSTALL) -e '.[docs]'
	touch $@
