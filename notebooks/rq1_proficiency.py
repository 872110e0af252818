# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# (rq1)=
# # RQ1: Proficiency
#
# How well does each editor change what it should, carry the change over to other wordings, and leave the rest alone?
# Each case is edited on its own; the edited model then writes a continuation of the edit prompt (effectiveness), of the
# rephrased prompt (generalization), of the five unrelated prompts (specificity), and two sampled texts (fluency).
# The measures are defined in [](#sec-method).

# %% tags=["parameters", "hide-input"]
subject: str = "smollm2-135m"  # registry name, Hugging Face id or folder
dataset: str = "cnle,csne"  # comma-separated
editors: str = "none,ft-l,grace"  # comma-separated; `clme list` shows all
cases: int = 8  # per data set
sample: int = 0  # which random sample of cases
within: str = ""  # folder of an earlier run: draw the cases from it and compare with it
source: str = "embedded"  # embedded, published, or a JSON file in the published layout
preset: str = "clean"  # clean or compat
values: str = "subject"  # hyper-parameters: subject, or transferred (the paper's)
seed: int = 42  # of every random draw
device: str = "auto"  # auto, cpu, cuda
dtype: str = "auto"  # auto (float32), float32, bfloat16, float16
batch_size: str = "8"  # cases edited and scored together, or auto: what memory allows
scored: bool = True  # False: keep the texts, score them later with `clme score`
name: str = "rq1"  # the run's name in its records
out: str = "runs/rq1"  # the run's folder; running again resumes it

# %% tags=["hide-input"]
import clme_lib as clme

config = clme.config_from_notebook(globals())

# %% tags=["hide-input"]
from IPython.display import Markdown, display

from clme_lib.study import rq1 as report

records = clme.run(config)

# %% [markdown]
# ## How the editors do

# %% tags=["hide-input"]
report.proficiency_table(records)

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Exact match by editor and measure; bars are 95 % Wilson intervals.", "name": "fig-rq1-proficiency"}}
import matplotlib.pyplot as plt

report.proficiency_figure(records)
plt.show()

# %% tags=["hide-input"]
Markdown(report.reading(records))

# %% [markdown]
# ## From CSNE to CNLE
#
# The paper's Table V asks whether an editor is as effective on code targets as on natural-language ones.

# %% tags=["hide-input"]
report.transfer_table(records)

# %% [markdown]
# ## What the edited models write
#
# Line breaks are shown as ⏎. A neighbour's continuation should be the one in the unedited row.

# %% tags=["hide-input"]
with_texts = clme.load_cases("cnle" if "cnle" in config.dataset else config.dataset[0], config.source)
Markdown(report.examples(records, with_texts))

# %% [markdown]
# [](#weight-editors) looks at updates of weights before any text is generated, to tell the method, the model and the code apart.

# %% tags=["hide-input"]
from clme_lib.study import spot_check

if config.within:
    compared = spot_check.compare(clme.load_run(config.out), clme.load_run(config.within))
    display(Markdown("## The same cases, published and here\n\n" + spot_check.to_markdown(compared)))
