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
# (rq2)=
# # RQ2: Efficiency
#
# What does an edit cost in time and memory, one at a time as the paper measures it? How much is gained when many cases are
# edited together, and how far is each editor from the least time that its arithmetic allows?

# %% tags=["parameters", "hide-input"]
subject: str = "smollm2-135m"  # registry name, Hugging Face id or folder
random_weights: bool = False  # random weights of a registered subject's exact shape
dataset: str = "cnle,csne"  # comma-separated
editors: str = "ft-l,rome,memit,pmet,malmen,grace,a-grace,a-grace-wo-cl,a-grace-wo-mean"  # comma-separated
cases: int = 10  # edited alone, per dataset and editor
batches: str = "1,8"  # comma-separated sizes whose throughput is measured
threads: int = 0  # CPU threads (0: as PyTorch chooses)
out: str = "runs/bench"  # folder of measurements; running again resumes it
device: str = "auto"  # auto, cpu, cuda
dtype: str = "auto"  # auto (float32), float32, bfloat16, float16

# %% tags=["hide-input"]
import clme_lib as clme
from clme_lib.study.config import BenchConfig
from clme_lib.study.paper import PAPER_VARIANTS
from clme_lib.study.rq2.measure import bench

# any other field of the configuration can be passed by its name as well: `clme bench --help` lists them
config = clme.config_from_notebook(globals(), BenchConfig)

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown

from clme_lib.study.rq2 import tables as rq2
from clme_lib.support.display import inline

measured = bench(config)

# %% [markdown]
# ## What was measured

# %% tags=["hide-input"]
caption = (
    "What was measured, on what. Random weights stand for a subject whose trained weights were unavailable: the sizes are exact."
)
rq2.circumstances(measured, label="tab-rq2-circumstances", caption=caption)

# %% [markdown]
# Where a subject's trained weights are unavailable, its exact architecture is filled with seeded random weights: time and memory of an
# edit depend on sizes. Nothing stops early then, every editor takes all of its steps; second moments are random positive-definite
# matrices; networks and encoders are untrained; the tokenizer is trained on the embedded cases. Such rows and figures say *random weights*.
#
# ## One edit at a time
#
# The clock runs around the whole edit: tokenising, optimising, solving. Statistics, context templates, encoders and a warm-up
# are outside. Memory is the allocator's peak on a GPU and the process's on a CPU, where it includes Python and its libraries, and what earlier edits left in it: so the paper's question whether
# 48 GB suffice cannot be answered on a CPU, and no figure of it is drawn.

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Median seconds of one edit, with quartiles where several were timed (logarithmic); the number of cases stands below, 0 where an editor was not measured or did not fit.", "name": "fig-rq2-time"}}
rq2.cost_figure(measured)
plt.show()

# %% tags=["hide-input"]
shown = rq2.findings(measured)
sentences = []
for subject_label, costs in shown["costs"].groupby(level="label", sort=False):
    each = [
        f"from {row['least']:.2g} s ({row['fastest']}) to {row['most']:.3g} s ({row['slowest']}) on {data}"
        for (_, data), row in costs.iterrows()
    ]
    sentences.append(f"On {subject_label}, an edit takes {' and '.join(each)}.")
if counts := shown["malmen"]:
    sentences.append(
        f"The paper finds MALMEN fastest and MEMIT and PMET slowest: of the {counts['pairs']} pairs of subject and dataset in which all "
        f"three were measured, MALMEN is the fastest in {counts['fastest']} and one of the other two the slowest in {counts['slowest']}."
    )
if counts := shown["csne_longer"]:
    sentences.append(
        f"The paper finds that CSNE edits take longer than CNLE edits; here they do in {counts['longer']} of {counts['pairs']} pairs of editor and subject."
    )
if largest := shown["shapes"]:
    slow, large = largest["seconds"], largest["peak_mib"]
    both = "time and memory" if slow == large else f"time, {large} the largest median memory"
    sentences.append(
        "It finds CodeQwen1.5-7B slowest and largest: of its subjects' shapes, by the editors measured on all, "
        f"{slow} has the largest median {both}."
    )
if peak := shown["half"]:
    sentences.append(f"The largest peak in 16 bits is {peak['gib']:.1f} GiB ({peak['editor']} on {peak['subject']}).")
if shown["too_large"]:
    lists = [f"{' and '.join(names)} on {subject_label}" for subject_label, names in shown["too_large"].items()]
    sentences.append(f"Did not fit into the device's memory: {'; '.join(lists)}.")
if not shown["on_gpu"]:
    sentences.append("Nothing of this was measured on a GPU.")
if shown["unmeasured"]:
    sentences.append(f"Not measured, because no device that holds them was available: {', '.join(shown['unmeasured'])}.")
Markdown("> **Findings**\n>\n" + "\n".join(f"> - {inline(sentence)}" for sentence in sentences))

# %% tags=["hide-input"]
caption = (
    "One edit at a time: median seconds with quartiles, and median peak memory with what was in use before the edit. Set-up "
    "(statistics, context templates and encoders, from the cache where they are there) and a warm-up are outside; n is per dataset."
)
rq2.cost_table(measured, label="tab-rq2-cost", caption=caption)

# %% [markdown]
# ## Many at a time
#
# Edits are values that act row by row, so cases can be edited together and their differently edited models generate in one
# batch. The results are the same; what changes is how well the device is used.

# %% tags=["hide-input"]
caption = "Edits per second, and edits with their evaluation per second, when cases are edited and scored together; n is the number of cases of each rate."
rq2.throughput_table(measured, label="tab-rq2-throughput", caption=caption)

# %% [markdown]
# ## How far from the floor
#
# Each editor's algorithm fixes how many operations and how much memory traffic an edit needs at least; the formulas are in
# [](#sec-floor). Divided by what the device reaches on a large matrix product and on a large copy, they give a floor.

# %% tags=["hide-input"]
caption = "What the device can do: a large matrix product, and a large copy (read and written)."
rq2.ceiling_table(measured, label="tab-rq2-ceilings", caption=caption)

# %% tags=["hide-input"]
caption = (
    "How far one edit alone is from its floor: the least time that its arithmetic and memory traffic take on this device."
)
rq2.floor_table(measured, label="tab-rq2-floor", caption=caption)

# %% [markdown]
# An edit alone is made of small products, most of all the codebooks' steps on a dozen columns; batches make larger ones of
# them. What the profiler found on long prompts, and what was done about it:
#
# - GRACE spent much of its time reading prompts that were padded to the longest of a batch, and multiplied by the vocabulary for few
#   labels at a time. Cases of like length are read and edited together since.
# - Every step joined the prefix's keys and values to the new columns', which copied them once for each head that shares them and
#   computed a gradient that nobody needs. Only the scores are joined now.
# - ROME, MEMIT and PMET computed the KL term with a separate projection to the vocabulary; it now comes from the logits that the loss has.
# - They also read each step's losses to find the cases that had stopped, for which a GPU has to be waited for. The device keeps this account
#   now, and is asked every fifth step. What that gains on a GPU has not been measured.
# - Compiled blocks were tried and are slower here ({numref}`tab-speed-compiled`).
#
# The remainder is mostly matrix multiplication at near-peak throughput.

# %% [markdown]
# ## What the whole study would take
#
# The plain procedure edits and generates one text at a time with unchanged library calls ([](#speed)), as the released program does.

# %% tags=["hide-input"]
caption = (
    f"Projected hours for {sum(rq2.PAPER_CASES.values()):,} cases (the paper's datasets; CSNE's lengths as mined here) by "
    f"{len(PAPER_VARIANTS)} editor variants, each edited and evaluated; training and set-up apart."
)
plain_seconds = None
if config.plain:
    plain_seconds = pd.read_csv(config.plain)
    caption += " The plain procedure's seconds per case are the speed appendix's, whose CSNE prompts have at least 110 tokens."
rq2.projection_table(measured, plain_seconds, label="tab-rq2-projection", caption=caption)

# %% [markdown]
# **Threats.** Seconds of a CPU say which editor does more work, not what a GPU would take: there small products cost a fixed time each, which these do not. Random weights have the right
# sizes, but nothing stops early with them, so that an editor that usually stops looks slower than it is. Where *n* is 1, the spread between cases is unknown. Plain seconds are of the plain procedure written for this study, not of the released
# program.

# %% [markdown]
# ## Your own question
#
# What the tables above are computed from is a pandas table, a row for each measurement; `kind` says of what (an edit, a batch, a set-up), and [](#sec-records) describes the columns that it shares with records.

# %%
edits = measured[measured["kind"] == "edit"]
edits.groupby(["subject", "dataset", "editor"], sort=False)["seconds"].describe().round(2)
