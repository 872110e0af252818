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
# What does one edit cost in time and memory when edits are made one at a time, as in the paper? How much is gained when many cases are
# edited together, and how far is each editor from the least time that its arithmetic allows?

# %% tags=["parameters", "hide-input"]
subject: str = "smollm2-135m"  # registered name, Hugging Face id or folder
random_weights: bool = False  # random weights of a registered subject's exact shape
dataset: str = "cnle,csne"  # comma-separated
editors: str = "ft-l,rome,memit,pmet,malmen,grace,a-grace,a-grace-wo-cl,a-grace-wo-mean"  # comma-separated
cases: int = 10  # cases edited one at a time, per dataset and editor
batches: str = "1,8"  # comma-separated batch sizes to measure throughput with
threads: int = 0  # CPU threads; 0 leaves the choice to PyTorch
out: str = "runs/bench"  # folder of measurements; running again resumes it
device: str = "auto"  # auto, cpu, cuda
dtype: str = "auto"  # auto (float32), float32, bfloat16, float16

# %% tags=["hide-input"]
import clme_lib as clme
from clme_lib.study.config import BenchConfig
from clme_lib.study.paper import PAPER_VARIANTS
from clme_lib.study.rq2.measure import bench, load_measurements

# any other field of the configuration can be passed by its name as well: `clme bench --help` lists them
config = clme.config_from_notebook(globals(), BenchConfig)

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
from IPython.display import Markdown

from clme_lib.study.rq2 import tables as rq2
from clme_lib.study.tables import read_csv
from clme_lib.support.display import inline

measured = bench(config)

# %% [markdown]
# ## What was measured

# %% tags=["hide-input"]
caption = (
    "What was measured, and on what machine. Random weights stand in for a subject whose trained weights were unavailable: the sizes are exact."
)
rq2.circumstances(measured, label="tab-rq2-circumstances", caption=caption)

# %% [markdown]
# Where a subject's trained weights are unavailable, its exact architecture is filled with seeded random weights, because the time and memory of an
# edit depend on sizes. In this case nothing stops early, so every editor takes all of its steps. Second moments are random positive-definite
# matrices, networks and encoders are untrained, and the tokenizer is trained on the embedded cases. Such rows and figures are marked *random weights*.
#
# ## One edit at a time
#
# Timing covers the whole edit: tokenising, optimising, solving. It excludes statistics, context templates, encoders and a
# warm-up. Memory is the allocator's peak on a GPU and the process's peak on a CPU, where it includes Python, its libraries and what earlier edits left behind. The paper's question whether
# 48 GB suffice therefore cannot be answered on a CPU, and no figure shows memory.

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Median seconds of one edit, with quartiles where several were timed (logarithmic scale); the number of cases is given below, 0 where an editor was not measured or did not fit.", "name": "fig-rq2-time"}}
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
        "The paper finds CodeQwen1.5-7B slowest and largest: of its subjects' shapes, by the editors measured on all, "
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
    sentences.append(f"Not measured, because no device large enough was available: {', '.join(shown['unmeasured'])}.")
Markdown("> **Findings**\n>\n" + "\n".join(f"> - {inline(sentence)}" for sentence in sentences))

# %% tags=["hide-input"]
caption = (
    "One edit at a time: median seconds with quartiles, and median peak memory with the memory in use before the edit. Set-up "
    "(statistics, context templates and encoders, from the cache where available) and a warm-up are excluded; n is per dataset."
)
rq2.cost_table(measured, label="tab-rq2-cost", caption=caption)

# %% [markdown]
# Putting the case into the prompt is no edit, and costs nothing when it is made. It costs its tokens whenever the model is used: the table has how many are read before each prompt.
#
# ## Many at a time
#
# Edits are values that act row by row, so cases can be edited together and the differently edited models can generate in one
# batch. The results are the same; only the utilisation of the device changes.

# %% tags=["hide-input"]
caption = "Edits per second, and edits with their evaluation per second, when cases are edited and scored together; n is the number of cases behind each rate."
rq2.throughput_table(measured, label="tab-rq2-throughput", caption=caption)

# %% [markdown]
# ## Distance from the floor
#
# Each editor's algorithm determines the minimum number of operations and the minimum memory traffic of an edit; the formulas are in
# [](#sec-floor). Dividing them by the rates that the device reaches on a large matrix product and on a large copy gives a lower bound on time, the floor.

# %% tags=["hide-input"]
caption = "What the device can do: a large matrix product, and a large copy (read and written)."
rq2.ceiling_table(measured, label="tab-rq2-ceilings", caption=caption)

# %% tags=["hide-input"]
caption = (
    "Distance of a single edit from its floor, the least time that its arithmetic and memory traffic take on this device."
)
rq2.floor_table(measured, label="tab-rq2-floor", caption=caption)

# %% [markdown]
# Once an edit is fast, most of a case is its evaluation: the texts that the edited model writes. Its floor counts each prompt that an edited model reads and each token that it writes. In a batch the cases'
# operations add up, and weights are read once for all of them.

# %% tags=["hide-input"]
caption = (
    "Editing and evaluating a batch of cases beside the least time that its arithmetic and memory traffic take on this device; one batch was timed for each row. The device's "
    "rates are those it reached when the batches were measured."
)
whole_cases = load_measurements(config.whole_cases) if config.whole_cases else measured
whole = rq2.whole_case_floor_table(whole_cases, label="tab-rq2-whole-case", caption=caption)
whole if len(whole.data) else Markdown("_These measurements are of a library that did not count what an evaluation computes._")

# %% [markdown]
# A single edit consists of small matrix products, above all in the codebooks' steps on a dozen positions; batching turns them into larger
# ones. The profiler showed the following on long prompts, and we changed the code accordingly:
#
# - GRACE spent much of its time reading prompts that were padded to the longest of a batch, and multiplied by the vocabulary for few
#   labels at a time. Cases of similar length are now read and edited together.
# - Every step concatenated the prefix's keys and values with those of the new positions. This copied them once for each head that shares them and
#   computed a gradient that is not needed. Now only the scores are concatenated.
# - ROME, MEMIT and PMET computed the KL term with a separate projection to the vocabulary; it now comes from the logits that the loss already has.
# - They also read each step's losses to identify the cases that had stopped, which requires waiting for a GPU. The device now keeps track of
#   these cases and is queried only every fifth step. The gain on a GPU has not been measured.
# - Compiled blocks were tried and are slower here ({numref}`tab-speed-compiled`).
#
# What remains is mostly matrix products, which for a model of this size are too small to reach the rate of a large one: even a batch of cases takes a multiple of its floor ({numref}`tab-rq2-whole-case`).

# %% [markdown]
# ## Projected time for the whole study
#
# The plain procedure edits and generates one text at a time with unchanged library calls ([](#speed)), as the released program does.

# %% tags=["hide-input"]
caption = (
    f"Projected hours for {sum(rq2.PAPER_CASES.values()):,} cases (the paper's datasets; CSNE's lengths as mined here) by "
    f"{len(PAPER_VARIANTS)} editor variants, each edited and evaluated; training and set-up are excluded."
)
plain_seconds = None
if config.plain:
    plain_seconds = read_csv(config.plain, ["plain s/case", "threads"], ["editor", "values", "data", "device"])
    caption += " The plain procedure's seconds per case come from the speed appendix, whose CSNE prompts have at least 110 tokens."
rq2.projection_table(measured, plain_seconds, label="tab-rq2-projection", caption=caption)

# %% [markdown]
# **Threats.** CPU times show which editor does more work, not what a GPU would take: on a GPU each small product has a fixed cost, which CPU times do not include. Random weights have the right
# sizes, but nothing stops early with them, so an editor that usually stops early looks slower than it is. Where *n* is 1, the spread between cases is unknown. Plain times are those of the plain procedure written for this study, not of the released
# program.

# %% [markdown]
# ## Your own question
#
# The tables above are computed from a pandas table with one row per measurement; `kind` says what was measured (an edit, a batch, a set-up), and [](#sec-records) describes the columns that it shares with records.

# %%
edits = measured[measured["kind"] == "edit"]
edits.groupby(["subject", "dataset", "editor"], sort=False)["seconds"].describe().round(2)
