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
# (rq4)=
# # RQ4: Many edits in one model
#
# The paper edits one case, evaluates it, and then removes the edit. Users of an edited model, however, keep their edits. How many can one model hold before the
# early ones are lost, or the answers to everything else change?
#
# Edits can be inserted in four ways ([](#sec-many)): one after another; all at once; or each alone, and then joined by SimIE, a method that combines separate updates, with its authors' constant or with one adapted to this model. Whenever the model holds 1, 3, 10, 30, 100, … edits, and at the
# end, *all* of them are evaluated; the neighbours' answers are compared with those of the original model.

# %% tags=["parameters", "hide-input"]
subject: str = "smollm2-135m-code"  # registered name, Hugging Face id or folder
dataset: str = "cnle"  # comma-separated
editors: str = "none,in-context,ft-l,rome,grace-tuned"  # comma-separated; `clme list` shows all
protocols: str = "sequential,batch,simie"  # comma-separated
cases: int = 3  # number of edits in one model
held_out: int = 3  # unedited cases on which each state is evaluated as well
samples: str = "0"  # comma-separated numbers of random samples, each with its own order
interference: str = ""  # table to show, as `clme measure interference` writes it
conflicts: str = ""  # table to show, as `clme measure conflicts` writes it
out: str = "runs/rq4"  # folder of the runs, one per protocol and sample; running again resumes them
device: str = "auto"  # auto, cpu, cuda
dtype: str = "auto"  # auto (float32), float32, bfloat16, float16

# %% tags=["hide-input"]
import clme_lib as clme
from clme_lib.study.config import ManyEditsConfig

# any other field of the configuration can be passed by its name as well: `clme run --help` lists them
config = clme.config_from_notebook(globals(), ManyEditsConfig)

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown

from clme_lib.study import rq4
from clme_lib.study.conflicts import SHARES, conflict_table
from clme_lib.study.interference import MEASURED, interference_table
from clme_lib.study.protocols import protocol_title
from clme_lib.study.tables import editor_name, percent, read_csv
from clme_lib.support.display import inline

records = rq4.run_many(config)

held = records["position"].max()
shown_protocols = ", ".join(f"{protocol_title(name)} (samples: {rows['sample'].nunique()})" for name, rows in records.groupby("protocol", sort=False))
Markdown(f"**Shown here:** {inline(shown_protocols)}; up to {held} edits in one model.")

# %% [markdown]
# ## Retention as the number of edits grows
#
# Seconds per edit were measured during the run, under whatever other load the machine had; {numref}`tab-speed-many` compares times within one process.

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Shares of the edits in the model that are right, of their rephrased prompts that are right, and of the neighbours' answers that are unchanged, by the number of edits (logarithmic scale); lines are 95% intervals, and states with few edits have few cases.", "name": "fig-rq4-retention"}}
figure = rq4.retention_figure(records)
plt.show()

# %% tags=["hide-input"]
of_ends = rq4.ends(records)
first = (of_ends[["dataset", "protocol"]] == of_ends[["dataset", "protocol"]].iloc[0]).all(axis=1)
caption = (
    f"Many edits in {', '.join(records['subject'].unique())}: each editor with the number of edits at which most sequences end, to compare editors, and with the most edits that it was given; the other states are "
    "in the folded table below. Shares in percent of all edits in the model, and of the first and the last ten made, with 95% intervals over cases and samples; n is edits times samples. Free EM: the model writes as much as it likes "
    "(section on free scores, in the method). MiB: tensors of all edits together."
)
rq4.retention_table(of_ends[first], label="tab-rq4-retention", caption=caption)

# %% tags=["hide-input"]
caption = "The same for the other protocols and datasets."
rq4.retention_table(of_ends[~first], label="tab-rq4-others", caption=caption) if not first.all() else None

# %% tags=["hide-input"]
caption = "The samples beside each other: each has its own cases and order. Percent of the edits in the model that are right, and of the neighbours' answers that are unchanged."
rq4.orders_table(records, label="tab-rq4-orders", caption=caption) if records.groupby(["dataset", "protocol", "editor"])["sample"].nunique().max() > 1 else None

# %% tags=["hide-input", "hide-output"]
caption = "As above, for every number of edits after which the model was evaluated."
rq4.retention_table(records, label="tab-rq4-states", caption=caption)

# %% tags=["hide-input"]
sentences = []
ends = pd.DataFrame([shown for shown in rq4.findings(records) if shown["editor"] != "none" and shown["held"][1] > 1])
for (dataset, protocol), shown in ends.groupby(["dataset", "protocol"], sort=False) if len(ends) else ():
    right, kept = (shown[name].map(lambda shares: shares[1]) for name in ("effectiveness_em", "specificity_rate"))
    parts = [
        f"{inline(editor_name(editor))} {percent(right[n])}% and {percent(kept[n])}% ({held[1]} edits)"
        for n, editor, held in shown.loc[right.sort_values(ascending=False, kind="stable").index, ["editor", "held"]].itertuples()
    ]
    sentences.append(f"**{inline(rq4.way_of(records, dataset, protocol))}**: {'; '.join(parts)}.")
text = "> **Findings.** For each editor, how many of the edits that the model holds at the end are right, and how many of the neighbours' answers are still the original model's.\n>\n"
Markdown(text + "\n".join(f"> - {sentence}" for sentence in sentences) if sentences else "_No editor holds more than one edit here._")

# %% [markdown]
# ## What the edits do to each other
#
# An update of a weight acts on every prompt. This table says how much, for edits made one after another on the selection cases, which are used for nothing else but choosing hyperparameters. The *lookup token* of a prompt is the one at which an editor writes, the final colon for most. *Norm* is the Frobenius norm of the sum of all updates, relative to that of the
# edited matrices; *Arrives at others* is what an edit adds at the lookup token of another edit's prompt, relative to what it adds at its own; *Later edits add* is what all later edits together add at an edit's own
# lookup token, relative to what the edit itself added there. All are medians over layers and edits, with keys of the original model. *Radius* is the median radius in a codebook, relative to the first edit's, and *Key* the squared norm of a key.

# %% tags=["hide-input"]
if config.interference:
    measured = read_csv(config.interference, ["edits", *MEASURED], ["editor", "dataset"])
    shown = interference_table(measured, label="tab-rq4-interference", caption="Edits made one after another, and what they do to each other; ratios, but for Key.")
else:
    shown = Markdown("_This was not measured for this page: `clme measure interference` measures it, and the parameter `interference` names its table._")
shown

# %% [markdown]
# An edit is learnt in the model that the earlier ones have changed. The next table says how well: the value of the editor's objective at which its optimisation stopped.

# %% tags=["hide-input"]
caption = (
    f"Objective at which an edit's optimisation stopped: means over the first and the last {rq4.ENDS} edits. Editors' objectives differ (loss of the target in nats per token; for ROME, EMMET, MEMIT, PMET, AlphaEdit "
    "and NeuralDB also their other terms, before the weights are written), so compare the first with the last, not editors with each other."
)
rq4.learning_table(records, label="tab-rq4-learnt", caption=caption)

# %% [markdown]
# What explains the published run:
#
# - **Updates of weights meet at the token that all prompts share** ([](#weight-editors)). Most of what an edit adds at its own lookup token arrives at the other edits' too (for AlphaEdit, and for MEMIT with accumulated statistics, less of it the more edits the model holds), and with thirty edits the later ones together add more there than the
#   edit itself did. The edits of ROME and of EMMET, which writes as ROME does, do not survive this. Their newer edits, and PMET's, are learnt worse as well ({numref}`tab-rq4-learnt`), since the model that has to learn them is already changed: ROME's edits that are made alone, for SimIE, are learnt equally well at both ends. FT-L's bound limits
#   one edit's change of a weight, but not the sum.
# - **MEMIT hardly reaches its targets on this model even alone** ([](#rq1)), so there is nothing to forget. Accumulated statistics do make later edits add less, but cannot change that.
# - **AlphaEdit keeps no more edits than MEMIT**, because its edits do not reach their targets alone either, and so this is no strong test of what its projection retains. It does harm held-out text less ({numref}`tab-rq4-ability`).
# - **Fine-tuned weights forget gradually.** On CNLE, FT-L, LocFT-BF and LoRA still have most of the newest edits when most of the first ones are lost, and the share that is right falls as edits are added. How many depends on the cases and their order ({numref}`tab-rq4-orders`). None of the three
#   spares many neighbours, not even with ten edits. On CSNE they lose most of the newest edits too.
# - **UltraEdit and MALMEN collapse in a sequence.** Of a hundred edits MALMEN holds none, and UltraEdit few; with three hundred of UltraEdit's, the model gives the held-out targets practically no probability ({numref}`tab-rq4-ability`). Each edit is a single step: no loss says when to stop, or that the model has left the region in which its gradient means anything.
# - **A codebook's radii shrink** where entries come close to each other ([](#sec-many)). With a selected radius, GRACE changes the neighbours' answers while it has a single entry, and spares nearly all when it has many. It keeps nearly all edits. On CNLE hardly
#   any rephrased prompt reaches them as soon as there are several, though a single edit with the selected radius reaches about a quarter ([](#rq1)); on CSNE, whose rephrased prompts are nearer ([](#rq3)), most of them. A-GRACE keeps nearly all edits as well, but on CNLE the share of rephrased prompts that reach them shrinks with the radii: what its encoder gains for single edits is soon lost.
# - **A case that is retrieved into the prompt is not forgotten.** The share of right answers is about that of single edits ([](#rq1)), because every prompt reads at most the nearest case. Rephrased CNLE prompts hardly ever retrieve it. Without retrieval every prompt reads all cases, which was measured for few edits only.
# - **SimIE keeps almost nothing of an edit with its authors' constant.** Of the first edit's update it keeps the share $\lVert k\rVert^2/(m+\lVert k\rVert^2)$ at its own key ({eq}`eq-simie`). Their $m=10^4$ is far larger than the squared norm of this model's keys (*Key*), so the neighbours are
#   spared because hardly anything is written. With $m$ in proportion to the keys (`simie-scaled`), ROME's first edits hold, but soon none does: the keys of prompts that end in the same token nearly coincide, and telling many of them apart takes coefficients so large that they disturb everything else. FT-L's
#   edits do not even hold alone, because SimIE keeps only what an update adds at the lookup token's key, and FT-L's acts at other tokens too.
# - **What is solved together interferes less.** All at once, UltraEdit and MALMEN solve one system with the keys of all cases ({eq}`eq-malmen`), so that each update takes account of where the others act. They then hold most of thirty
#   edits, more than twice as many as in a sequence of the same cases. MALMEN also leaves the perplexity of held-out text as it was and spares many neighbours; UltraEdit spares few. MEMIT, AlphaEdit and EMMET solve for all keys too, which does not help them here: AlphaEdit spares about half of the neighbours because it writes little.
# - **All at once, LocFT-BF takes no more steps for thirty cases** than it takes for a single case alone, since all of them fit into one of its mini-batches. Few of them are then learnt.
#
# ## What else the model can do
#
# Each state is also evaluated on cases that it was not edited with: the perplexity of their targets, given their prompts, and what the model writes. The rows of the unedited model are the starting point:
# in the published run it can do hardly any of these cases, so *Executes* has little to lose, and perplexity and *Runs* say more.

# %% tags=["hide-input"]
if records["held_out"].any():
    caption = "Held-out cases, evaluated in the same states as above. Perplexity over all target tokens; shares in percent; 95% intervals over cases and samples."
    runs = records[records["held_out"]].get("free_effectiveness_executes", pd.Series(dtype=float))
    caption += " None of these cases has a check that could be run, so the columns Runs and Executes are empty." if runs.isna().all() else " Runs: what the model writes runs without an error; Executes: it passes the case's test as well."
    shown = rq4.ability_table(of_ends, label="tab-rq4-ability", caption=caption)
else:
    shown = Markdown("_No cases were held out of these runs: the parameter `held_out` says how many._")
shown

# %% tags=["hide-input", "hide-output"]
caption = "Held-out cases, for every number of edits after which the model was evaluated."
rq4.ability_table(records, label="tab-rq4-ability-states", caption=caption) if records["held_out"].any() else None

# %% tags=["hide-input"]
lost = pd.DataFrame(rq4.ability_findings(records))
sentences = []
for (dataset, protocol), shown in lost.groupby(["dataset", "protocol"], sort=False) if len(lost) else ():
    ratios = shown.loc[shown["ratio"].str[0].sort_values(kind="stable").index, ["editor", "held", "ratio"]]
    parts = []
    for editor, held, bounds in ratios.itertuples(index=False):
        mean, low, high = (f"{bound:.2f}" if bound < 1000 else f"{bound:.3g}" for bound in bounds)
        parts.append(f"{inline(editor_name(editor))} {mean} ({low}–{high}; {held} edits)")
    sentences.append(f"**{inline(rq4.way_of(records, dataset, protocol))}**: {'; '.join(parts)}.")
text = "> **Findings.** Perplexity of the held-out targets with all edits, relative to the unedited model's on the same cases, with the 95% interval of the ratio.\n>\n"
Markdown(text + "\n".join(f"> - {sentence}" for sentence in sentences)) if sentences else None

# %% [markdown]
# ## Edits that contradict each other
#
# Each prompt is edited twice, the second time in the model that holds the first edit: once with the target of another case, and once with what the original model wrote, which
# should take the first edit back. As a control, the other case's target is also edited in a model without the first edit: a target that no edit of this editor reaches says nothing about conflicts.

# %% tags=["hide-input"]
if config.conflicts:
    contradicting = read_csv(config.conflicts, list(SHARES), ["editor", "dataset"])
    caption = "Two edits of one prompt in one model; shares of the cases, and of the neighbours' answers that are the original model's, with 95% intervals."
    shown = conflict_table(contradicting, label="tab-rq4-conflicts", caption=caption)
else:
    shown = Markdown("_No such pairs were measured for this page: `clme measure conflicts` measures them, and the parameter `conflicts` names its table._")
shown

# %% [markdown]
# In the published run, editing back restores the original answer in every case with every editor but the case in the prompt: there both cases stand before the prompt, and the model may follow either. The neighbours
# that a weight update has changed are not restored with it. ROME writes a second target much less often than without the first edit, although the first target is gone as well.
#
# **Threats.** The case in the prompt without retrieval was evaluated with fewer edits than the others, because thirty cases before every prompt make an evaluation many times longer. Only one sample, in one order, was used for held-out cases and for all ways except *one after another*; an interval over cases in one order does not show what another order would give. All edits use one template and are unrelated to
# each other, whereas a user's edits would often concern the same library. What the model can do otherwise is measured on cases of the same kind only ([](#sec-threats)).

# %% [markdown]
# ## Your own question
#
# The tables above are computed from a pandas table with one row per edited case and number of edits held; [](#sec-records) describes its columns.

# %%
edited = records[~records["held_out"]]
by_state = edited.groupby(["protocol", "editor", "position"], sort=False)
(100 * by_state[["effectiveness_em", "specificity_rate"]].mean()).round(1)
