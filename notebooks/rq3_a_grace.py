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
# (rq3)=
# # RQ3: A-GRACE
#
# GRACE asks its codebook with the last token's key. Another wording of the same request has another key, so the edit is
# not found. A-GRACE asks with an encoded mean over the whole prompt ([](#sec-a-grace)). Does that carry edits over, and what
# does it cost the neighbours?
#
# Beside the run itself, this notebook makes the same cases with the released program's defects (a second run, in the folder
# `<out>-compat`) and three small tables in the run's folder: the sweep of the radius, the picture of a case, and edits timed alone.

# %% tags=["parameters", "hide-input"]
subject: str = "smollm2-135m"  # registry name, Hugging Face id or folder
dataset: str = "cnle,csne"  # comma-separated
editors: str = "none,grace,a-grace,a-grace-wo-cl,a-grace-wo-mean"  # comma-separated; `clme list` shows all
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
name: str = "rq3"  # the run's name in its records
out: str = "runs/rq3"  # the run's folder; running again resumes it

# %% tags=["hide-input"]
import clme_lib as clme

config = clme.config_from_notebook(globals())

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
from IPython.display import Markdown

from clme_lib.study.rq3 import measurements
from clme_lib.study.rq3 import tables as rq3

compat = measurements.compat_run(config)
records = clme.run(config)

# %% [markdown]
# ## A-GRACE and what it is made of
#
# In the paper A-GRACE raises GRACE's generalization on CNLE from almost zero to 80.86 % exact match, on average over its subjects. Its encoder
# learns from 10,528 cases there, from a few hundred here; [](#encoders) shows what more of them change.

# %% tags=["hide-input"]
rq3.ablation_table(records)

# %% tags=["hide-input"]
Markdown(rq3.reading(records, compat))

# %% tags=["hide-input"]
rq3.paired_table(records)

# %% [markdown]
# ## Why GRACE does not generalize
#
# The distance from the edit prompt (OI) to its rephrased prompt (GRI) should be below the radius, that to its neighbours (SRI) above it.
# Where the line lies inside the band, no radius tells the two apart; where it lies below the band but above the radius, a larger radius would.

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Distances from the edit prompt, case by case; above GRACE's keys (the last token's), below A-GRACE's (the encoded mean).", "name": "fig-rq3-distances"}}
rq3.distance_figure(records)
plt.show()

# %% tags=["hide-input"]
Markdown(rq3.distance_reading(records))

# %% tags=["hide-input"] mystnb={"figure": {"caption": "One sampled case of each data set in the plane of its prompts' first two principal components.", "name": "fig-rq3-case"}}
places = measurements.projection(config)
rq3.projection_figure(places)
plt.show()

# %% tags=["hide-input"]
rq3.projection_table(places)

# %% [markdown]
# ## Both presets side by side
#
# In the released program the query of A-GRACE (and of w/o CL) is a mean over no tokens from the second generation after an edit on: it is NaN,
# and the codebook never fires. The specificity and fluency that it reports are therefore the unedited model's. The clean preset consults the
# codebook in every generation.

# %% tags=["hide-input"]
rq3.preset_table(records, compat)

# %% [markdown]
# ## Margin and radius
#
# A larger radius finds more rephrased prompts and more neighbours. The curves come from the selection cases, which are in no
# table above, with encoders trained on all the others; a dot marks the paper's radius of 1. The margins
# that the tables above use are among the values in [](#sec-subject).

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Generalization against unchanged neighbours as the radius grows, for encoders trained with several margins.", "name": "fig-rq3-radius"}}
sweep = measurements.sweep(config)
rq3.radius_figure(sweep)
plt.show()

# %% tags=["hide-input"]
Markdown(rq3.radius_reading(sweep))

# %% tags=["hide-input"]
rq3.radius_table(sweep)

# %% [markdown]
# ## What an edit costs
#
# The variants take turns on each case, so that their ratio holds even where the machine had other work and the seconds are long.

# %% tags=["hide-input"]
rq3.overhead_table(measurements.overhead(config))
