# Stitch. `make help` lists the targets. Needs git, GNU make 3.81 or later and Python 3.11 to 3.13;
# the rest is set up in .venv on the first use, and again when requirements.txt changes.

# Updates of each run; empty: 50,000 for Hopper, 20,000 in the maze.
UPDATES ?=
SEEDS ?= 2
# Further arguments: of tools/challenge.py in `make train` and `make challenge`, else of pytest.
ARGS ?=
# A Python to use. Empty: the first that fits of those in PYTHONS.
PYTHON ?=
# A package index for torch, such as https://download.pytorch.org/whl/cpu. Empty: PyPI's own build.
TORCH_INDEX ?=

BIN := .venv/bin
STAMP := .venv/.installed
PYTHONS = $(if $(PYTHON),'$(PYTHON)',python3.13 python3.12 python3.11 python3 python)
WANTED := Python 3.11, 3.12 or 3.13

# Prints "ok PATH", "novenv PATH VERSION", or "none" and what was found instead. A .venv that is
# whole is used as it is; a candidate counts by the version it prints, as a command may be a stub.
FIND_PYTHON = novenv=; seen=; \
	for p in $(BIN)/python $(PYTHONS); do \
		v=`"$$p" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null` || continue; \
		case "$$v" in \
			(3.11|3.12|3.13) ;; \
			(*) seen="$${seen:+$$seen, }$$p is $$v"; continue ;; \
		esac; \
		case "$$p" in \
			($(BIN)/python) "$$p" -m pip --version >/dev/null 2>&1 || continue ;; \
			(*) "$$p" -c 'import ensurepip, venv' >/dev/null 2>&1 || \
				{ novenv="$${novenv:-$$p $$v}"; continue; } ;; \
		esac; \
		echo "ok $$p"; exit 0; \
	done; \
	if test -n "$$novenv"; then echo "novenv $$novenv"; else echo "none $$seen"; fi

FOUND_PATH = $(wordlist 2,$(words $(FOUND)),$(FOUND))
NO_PYTHON = Stitch needs $(WANTED) ($(if $(FOUND_PATH),found: $(FOUND_PATH),$(if \
	$(PYTHON),$(PYTHON) does not run,none found))). Install one, or name it: make \
	PYTHON=/path/to/python3.12 $(firstword $(MAKECMDGOALS) train)
NO_VENV = $(word 2,$(FOUND)) cannot make virtual environments (no ensurepip). On Debian or Ubuntu: \
	sudo apt install python$(word 3,$(FOUND))-venv; or name another: make \
	PYTHON=/path/to/python3.12 $(firstword $(MAKECMDGOALS) train)

.PHONY: help setup train challenge test lint clean
.DEFAULT_GOAL := help

help:
	@echo 'make train                  BC and IQL on recorded Hopper, a picture and an answer: 7 to 10 minutes on two cores'
	@echo 'make train UPDATES=1000000  the full length of the papers: hours on a CPU'
	@echo 'make challenge              the same, and a maze where IQL joins parts of episodes: 9 to 12 minutes'
	@echo '                            both take SEEDS=4 UPDATES=300 ARGS="--workers 1 --out FOLDER"'
	@echo 'make test                   ruff and pytest on all cores; ARGS="-k iql" passes on to pytest'
	@echo 'make lint                   ruff alone'
	@echo 'make setup                  only the virtual environment in .venv (the others do it themselves)'
	@echo 'make clean                  remove the caches; .venv and runs/ stay'
	@echo 'Settings: PYTHON=/path/to/python3.12, TORCH_INDEX=https://download.pytorch.org/whl/cpu'

setup: $(STAMP)

$(STAMP): requirements.txt
	$(eval FOUND := $(shell $(FIND_PYTHON)))
	$(if $(filter novenv,$(firstword $(FOUND))),$(error $(NO_VENV)))
	$(if $(filter ok,$(firstword $(FOUND))),,$(error $(NO_PYTHON)))
	@echo 'Setting up .venv with $(FOUND_PATH): once, some minutes.'
	$(if $(filter $(BIN)/python,$(FOUND_PATH)),,'$(FOUND_PATH)' -m venv --clear .venv)
	$(BIN)/python -m pip install --disable-pip-version-check \
		$(if $(TORCH_INDEX),--extra-index-url '$(TORCH_INDEX)') -r requirements.txt
	@touch $@

CHALLENGE = $(BIN)/python tools/challenge.py
LENGTH = --seeds $(SEEDS) $(if $(UPDATES),--updates $(UPDATES)) $(ARGS)

train: $(STAMP)
	$(CHALLENGE) hopper $(LENGTH)

challenge: $(STAMP)
	$(CHALLENGE) hopper maze $(LENGTH)

# One thread a worker: pytest-xdist already uses every core.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -prune -exec rm -rf {} +
