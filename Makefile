# Two commands: `make demo` and `make test`. Both make .venv themselves and are quick the second time.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# pip's upgrade of torch and friends is wanted only when one of these changes
READY := $(VENV)/.ready

.PHONY: demo test lint bench clean

demo: $(READY)
	$(RUN) -m fastprompt.demo $(ARGS)

test: $(READY)
	$(RUN) -m pytest -n auto $(ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(READY)
	$(RUN) -m benchmarks $(ARGS)

# in place: the sources in this folder are what runs, csrc/ is built beside them
$(READY): pyproject.toml setup.py $(wildcard csrc/* csrc/cuda/*)
	$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[demo,dev]'
	touch $@

clean:
	rm -rf build $(VENV) *.egg-info fastprompt/_native.*
