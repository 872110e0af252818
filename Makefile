# make book   everything: environment, a real run on this machine, its comparison with the published run, the site
# make site   render the book without running anything
# make pdf    the whole book as one PDF (needs Chromium)
# make test   the tests without the slow ones (a few minutes); make test-all runs those too
# Variables: PYTHON (3.11 to 3.13), CASES (per dataset), SAMPLE (which random cases are checked), TORCH_INDEX
#            (e.g. https://download.pytorch.org/whl/cpu for the small CPU build of torch), BUILDS (folders of datasets that
#            clme data build made, for the benchmark chapter to show)
SHELL := /bin/bash
PYTHON ?= python3
CASES ?= 4
SAMPLE ?= 1
TORCH_INDEX ?=
BUILDS ?=
PUBLISHED := results/runs/smollm2-135m
NAME := $(notdir $(PUBLISHED))
comma := ,
# RQ4's runs, each a protocol and a sample
MANY_RUNS := sequential-0 sequential-1 sequential-2 batch-0 simie-0 simie-scaled-0
# editors that make CNLE edits one after another, by their number; what a trained editor learns from depends on how many cases are edited, so its run cannot grow
MANY_10 := in-context
MANY_100 := ft-l,rome,memit,memit-accumulated,pmet,malmen,grace,grace-tuned,a-grace,alphaedit,emmet,neuraldb,locft-bf,lora
MANY_300 := none,in-context-retrieved,ultraedit
MANY_EDITORS := $(MANY_300),$(MANY_100),$(MANY_10)
# the same in other orders; thirty edits of CSNE; those that make all edits at once; those whose edits SimIE joins
MANY_REPEATED_100 := none,in-context-retrieved,grace,locft-bf,lora
MANY_REPEATED_30 := ft-l,rome,memit,memit-accumulated,pmet,malmen,grace-tuned,a-grace,alphaedit,emmet,neuraldb,ultraedit
MANY_CSNE := none,in-context-retrieved,ft-l,rome,memit,memit-accumulated,pmet,grace,grace-tuned,a-grace,alphaedit,emmet,neuraldb,ultraedit,locft-bf,lora
MANY_JOINTLY := memit,locft-bf,ultraedit,alphaedit,emmet,malmen
MANY_SIMIE := ft-l,rome
MANY := results/many/$(NAME)-code
ALL := none,in-context,in-context-retrieved,ft-l,rome,memit,pmet,malmen,grace
# metrics for which what was written is run
EXECUTED := free_effectiveness_executes,free_generalization_executes,fails_syntax,fails_name,fails_import,fails_attribute,fails_type,fails_memory,fails_other,fails_wrong,fails_time,fails_ended
RQ3 := a-grace,a-grace-wo-cl,a-grace-wo-mean
# a changed library edits the cases anew: resuming would show what the old one did
LIBRARY := $(shell find clme_lib -type f \( -name '*.py' -o -name '*.yaml' -o -name '*.json*' \) | LC_ALL=C sort | xargs cat | sha256sum | cut -c1-8)
OWN := runs/book-$(LIBRARY)-$(SAMPLE)-$(CASES)
# the benchmark chapter of a book that is built locally: with texts of CSNE, which are not ours to publish, and with BUILDS
BENCHMARK := runs/benchmark-$(shell echo $(LIBRARY) $(abspath $(BUILDS)) | sha256sum | cut -c1-8).ipynb
BIN := .venv/bin
# processes of the tests, each with one thread; every one of them takes about 1.5 GB
JOBS ?= 2

# On a machine without network: a cache filled by `CLME_CACHE=folder clme prepare` elsewhere, to which the wheels that the machine
# lacks are added (make gpu WHEELS=folder); texts are then scored later, by `clme score` where the packages for it are
WHEELS ?=
GPU := runs/gpu
DEVICE ?= cuda
SHAPES ?= codellama-7b codeqwen1.5-7b stablecode-3b
LIMIT ?= 460
ifdef WHEELS
$(if $(word 2,$(WHEELS)),$(error WHEELS="$(WHEELS)": make cannot tell a space in a path from two paths; choose a folder without))
GPU_READY := $(GPU)/packages/.ready
GPU_RUN = CLME_CACHE=$(abspath $(WHEELS)) PYTHONPATH=$(CURDIR)/$(GPU)/packages:$(CURDIR) $(PYTHON)
else
GPU_READY := .venv/.ready
GPU_RUN = $(BIN)/python
endif

.PHONY: setup book site pdf test test-all lint bench check gpu gpu-tests gpu-bench gpu-run publish clean

setup: .venv/.ready

.venv/.ready: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3,11) <= sys.version_info < (3,14) else "Python 3.11 to 3.13 is needed, this is " + sys.version.split()[0] + "; set PYTHON=")'
	@test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e ".[book,dev]"
	$(BIN)/jupytext --quiet --sync notebooks/*.py
	@touch $@

book: $(OWN)/rq1_proficiency.ipynb $(BENCHMARK)
	$(BIN)/clme check $(OWN) $(PUBLISHED)
	@$(BIN)/python book/build.py book/own_run=$< results/notebooks/benchmark=$(BENCHMARK)

# one case of ROME and MEMIT, then the notebook, whose own cell runs or resumes the others'; it is executed again only when it, the library or the records change
$(OWN)/rq1_proficiency.ipynb: .venv/.ready notebooks/rq1_proficiency.py $(shell find $(PUBLISHED) -type f)
	@$(BIN)/clme prepare
	$(BIN)/clme run --editor rome,memit --cases 1 --sample $(SAMPLE) --within $(PUBLISHED) --name $(NAME) --out $(OWN)
	$(BIN)/clme notebook notebooks/rq1_proficiency.py $@ -p cases $(CASES) -p sample $(SAMPLE) -p within $(PUBLISHED) -p name $(NAME) -p out $(OWN)

$(BENCHMARK): .venv/.ready notebooks/benchmark.py $(wildcard $(addsuffix /*,$(BUILDS)))
	@$(BIN)/clme notebook notebooks/benchmark.py $@ -p samples_of cnle,csne -p builds "$(BUILDS)"

site: .venv/.ready $(if $(BUILDS),$(BENCHMARK))
	@$(BIN)/python book/build.py $(addprefix book/own_run=,$(wildcard $(OWN)/rq1_proficiency.ipynb)) \
	  $(addprefix results/notebooks/benchmark=,$(or $(filter $(BENCHMARK),$^),$(wildcard $(BENCHMARK))))

pdf: .venv/.ready
	@$(BIN)/python book/pdf.py

test: .venv/.ready
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m 'not slow and not browser and not gpu'

test-all: .venv/.ready
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

lint: .venv/.ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: .venv/.ready
	$(BIN)/python benchmarks/fast_path.py --out runs/fast_path.csv

# more cases, or other editors: make check EDITOR=grace CASES=50
EDITOR ?= none,ft-l,grace
check: .venv/.ready
	$(BIN)/clme run --editor $(EDITOR) --cases $(CASES) --sample $(SAMPLE) --within $(PUBLISHED) --name $(NAME) --out runs/check-$(LIBRARY)
	$(BIN)/clme check runs/check-$(LIBRARY) $(PUBLISHED)

# three parts, each under eight minutes; one that ran out of time goes on when it is started again. What they measure is in runs/gpu
gpu: gpu-tests gpu-bench gpu-run

$(GPU)/packages/.ready: $(wildcard $(WHEELS)/*.whl)
	$(if $^,$(PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target $(GPU)/packages $^)
	@mkdir -p $(@D) && touch $@

gpu-tests: $(GPU_READY)
	CLME_TEST_DEVICE=$(DEVICE) timeout $(LIMIT) env $(GPU_RUN) -m pytest -m gpu tests/test_gpu.py

gpu-bench: $(GPU_READY)
	timeout $(LIMIT) sh -c 'for subject in $(SHAPES); do $(GPU_RUN) -m clme_lib.cli bench --subject $$subject --random-weights \
	  --dtype bfloat16 --device $(DEVICE) --cases 5 --batches 1,16,64 --out $(GPU)/bench || exit 1; done; \
	  $(GPU_RUN) -m clme_lib.cli bench --device $(DEVICE) --batches 1,16,64 --out $(GPU)/bench'

gpu-run: $(GPU_READY)
	timeout $(LIMIT) env $(GPU_RUN) -m clme_lib.cli run --editor $(ALL),$(RQ3) --cases 300 --batch-size auto --device $(DEVICE) \
	  $(if $(WHEELS),--unscored) --name $(NAME) --out $(GPU)/$(NAME)

# the only target that writes results/: all steps resume, and published records are never overwritten
publish: .venv/.ready
	for editor in ft-l rome memit pmet grace; do test -f results/selection/smollm2-135m.$$editor.csv || \
	  $(BIN)/clme measure selection --editor $$editor --out results/selection/smollm2-135m.$$editor.csv || exit 1; done
	test -f results/selection/smollm2-135m.malmen.csv || \
	  $(BIN)/clme measure selection --editor malmen --dataset cnle --cases 10 --out results/selection/smollm2-135m.malmen.csv
	for editor in grace ft-l rome memit pmet grace-tuned a-grace in-context-retrieved; do test -f results/selection/$(NAME)-code.$$editor.csv || \
	  $(BIN)/clme measure selection --subject $(NAME)-code --editor $$editor --cases 10 --out results/selection/$(NAME)-code.$$editor.csv || exit 1; done
	for editor in ultraedit lora alphaedit emmet neuraldb locft-bf; do test -f results/selection/$(NAME)-code.$$editor.csv || \
	  $(BIN)/clme measure selection --subject $(NAME)-code --editor $$editor --dataset cnle --cases 5 --out results/selection/$(NAME)-code.$$editor.csv || exit 1; done
	test -f results/selection/$(NAME)-code.malmen.csv || \
	  $(BIN)/clme measure selection --subject $(NAME)-code --editor malmen --dataset cnle --cases 20 --out results/selection/$(NAME)-code.malmen.csv
	for editor in rome memit pmet malmen; do test -f results/presets/smollm2-135m.$$editor.csv || \
	  $(BIN)/clme measure presets --editor $$editor --cases 20 --out results/presets/smollm2-135m.$$editor.csv || exit 1; done
	test -f results/diagnosis/smollm2-135m.csv || $(BIN)/clme measure weight-updates --out results/diagnosis/smollm2-135m.csv
	test -f results/diagnosis/smollm2-135m.pmet.csv || $(BIN)/clme measure pmet-parts --out results/diagnosis/smollm2-135m.pmet.csv
	test -f results/lookups/$(NAME)-code.rome.csv || $(BIN)/clme measure lookups --subject $(NAME)-code --editor rome --dataset cnle --cases 10 \
	  --out results/lookups/$(NAME)-code.rome.csv
	for editor in grace ft-l; do test -f results/end_of_target/$(NAME)-code.$$editor.csv || \
	  $(BIN)/clme measure end-of-target --subject $(NAME)-code --editor $$editor --dataset cnle --cases 10 --out results/end_of_target/$(NAME)-code.$$editor.csv || exit 1; done
	$(BIN)/clme measure encoders --out results/encoders/smollm2-135m.csv
	test -f results/statistics/smollm2-135m.csv || $(BIN)/clme measure statistics --out results/statistics/smollm2-135m.csv
	test -d $(PUBLISHED) || { $(BIN)/clme run --editor $(ALL),$(RQ3) --cases 100 --out runs/publish/$(NAME) && \
	  $(BIN)/clme notebook notebooks/rq3_a_grace.py runs/publish/rq3.ipynb -p cases 100 -p name $(NAME) -p out runs/publish/$(NAME) && \
	  $(BIN)/clme publish runs/publish/$(NAME)-compat $(PUBLISHED)-compat && $(BIN)/clme publish runs/publish/$(NAME) $(PUBLISHED); }
	test -d $(PUBLISHED)-code || { $(BIN)/clme run --subject smollm2-135m-code --editor $(ALL),grace-tuned,$(RQ3) --cases 100 --name $(NAME)-code --out runs/publish/code && \
	  $(BIN)/clme run --subject smollm2-135m-code --dataset cnle --editor alphaedit,emmet,neuraldb,ultraedit,locft-bf,lora --cases 20 --name $(NAME)-code --out runs/publish/code && \
	  $(BIN)/clme score runs/publish/code runs/publish/$(NAME)-code --metrics $(EXECUTED) && \
	  $(BIN)/clme measure radius --subject $(NAME)-code --cases 30 --out runs/publish/$(NAME)-code/radius.csv && $(BIN)/clme publish runs/publish/$(NAME)-code $(PUBLISHED)-code; }
	$(BIN)/clme notebook notebooks/rq1_proficiency.py results/notebooks/rq1_proficiency.ipynb -p editors $(ALL) -p cases 100 -p name $(NAME) -p out $(PUBLISHED) -p beside $(PUBLISHED)-code
	$(BIN)/clme bench --threads 2 --out results/efficiency
	$(BIN)/clme bench --threads 2 --editors in-context --batches "" --out results/efficiency
	test -f results/whole_case/$(NAME).jsonl || $(BIN)/clme bench --dataset cnle --editors ft-l,grace --cases 1 --batches 16 --threads 2 --out results/whole_case
	for subject in $(SHAPES); do test -f results/efficiency/$$subject-random.jsonl || $(BIN)/clme bench --subject $$subject --random-weights \
	  --dtype bfloat16 --device cpu --threads 2 --cases 1 --batches "" --out results/efficiency || exit 1; done
	$(BIN)/clme notebook notebooks/rq2_efficiency.py results/notebooks/rq2_efficiency.ipynb -p show results/efficiency \
	  -p whole_cases results/whole_case -p plain results/benchmarks/whole_case.csv
	$(BIN)/clme notebook notebooks/rq3_a_grace.py results/notebooks/rq3_a_grace.ipynb -p cases 100 -p name $(NAME) -p out $(PUBLISHED) -p beside $(PUBLISHED)-code
	many() { $(BIN)/clme run --subject $(NAME)-code --protocol $$1 --sample $$2 --name $(NAME)-code-$$1-$$2 --out runs/publish/many/$$1-$$2 --dataset $$3 --cases $$4 --editor "$${@:5}"; }; \
	for made in $(MANY_RUNS); do test -d $(MANY)/$$made || { \
	  case $$made in \
	    sequential-0) many sequential 0 cnle 10 $(MANY_10) --held-out 20 && \
	      many sequential 0 cnle 100 $(MANY_100) --held-out 20 && many sequential 0 cnle 300 $(MANY_300) --held-out 20 && many sequential 0 csne 30 $(MANY_CSNE);; \
	    sequential-*) many sequential $${made#*-} cnle 30 $(MANY_REPEATED_30) && many sequential $${made#*-} cnle 100 $(MANY_REPEATED_100);; \
	    batch-0) many batch 0 cnle 30 $(MANY_JOINTLY) --held-out 20;; \
	    simie*) many $${made%-0} 0 cnle 30 $(MANY_SIMIE) --held-out 20;; \
	  esac && \
	  $(BIN)/clme score runs/publish/many/$$made runs/publish/many-run/$$made --metrics $(EXECUTED) && \
	  $(BIN)/clme publish runs/publish/many-run/$$made $(MANY)/$$made; } || exit 1; done
	test -f results/conflicts/$(NAME)-code.csv || $(BIN)/clme measure conflicts --subject $(NAME)-code --cases 12 --out results/conflicts/$(NAME)-code.csv
	test -f results/interference/$(NAME)-code.csv || $(BIN)/clme measure interference --subject $(NAME)-code --out results/interference/$(NAME)-code.csv
	$(BIN)/clme notebook notebooks/rq4_many_edits.py results/notebooks/rq4_many_edits.ipynb -p dataset cnle,csne -p editors $(MANY_EDITORS) -p cases 300 -p held_out 20 \
	  -p protocols sequential,batch,simie,simie-scaled -p samples 0,1,2 -p out $(MANY) \
	  -p interference results/interference/$(NAME)-code.csv -p conflicts results/conflicts/$(NAME)-code.csv
	for page in benchmark $(basename $(notdir $(wildcard notebooks/appendix_*.py))); do \
	  $(BIN)/clme notebook notebooks/$$page.py results/notebooks/$$page.ipynb || exit 1; done
	$(BIN)/clme notebook notebooks/scorecard.py results/notebooks/scorecard.ipynb
	$(BIN)/python -m clme_lib.study.numbers

clean:
	rm -rf _build .venv
