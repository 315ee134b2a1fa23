# Two commands do for a newcomer: `make run` and `make test`. Both make .venv when it is missing.
PY := .venv/bin/python
JOBS ?= 2
export PYTHON
unexport PYTHONDONTWRITEBYTECODE  # packages are installed uncompiled: where it is set, every process would compile torch anew (5 s instead of 2.5)

.DEFAULT_GOAL := help
.PHONY: help run test gpu check lab docs export clean

help:
	@echo "make run      open the explorer in a browser (first time: makes .venv, about 7 GB on Linux)"
	@echo "make test     every check and test (ARGS='-k shapes' picks some, ARGS=--slow adds the slow ones, JOBS=4 runs four at a time)"
	@echo "make gpu      kernels, layers, mixers and training steps on an NVIDIA GPU, in about 8 minutes (ARGS=--list shows the cases)"
	@echo "make lab      JupyterLab on the tutorials"
	@echo "make export   clean the notebooks; write essl_nb/, README.md and pages of docs/ from them"
	@echo "make check    say whether notebooks, modules, README.md and docs/ are in step (make test does this first)"
	@echo "make docs     build the site of notebooks into _site/"
	@echo "make clean    remove what tests and builds leave behind (.venv stays)"

run:
	@sh tools/env.sh run
	@.venv/bin/essl_explore $(ARGS)

test:
	@sh tools/env.sh dev
	@sh tools/env.sh browser
	@$(PY) tools/check.py
	@echo "essl_nb: running the tests, $(JOBS) at a time"
	@$(PY) -m pytest -n $(JOBS) --dist worksteal $(ARGS)

gpu:
	@sh tools/env.sh dev
	@$(PY) tools/gpu.py $(ARGS)

check:
	@sh tools/env.sh dev
	@$(PY) tools/check.py

lab:
	@sh tools/env.sh dev
	@$(PY) -m jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/tutorials --LabApp.news_url= --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate

export:
	@sh tools/env.sh dev
	@$(PY) tools/check.py --mend

docs:
	@sh tools/env.sh docs
	@$(PY) tools/website.py

clean:
	rm -rf build dist _site .cache .pytest_cache .gradio *.egg-info
	find essl_nb tests tools app -name __pycache__ -prune -exec rm -rf {} +
