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
# (weight-editors)=
# # Appendix C: what updates of weights do
#
# ROME, MEMIT and PMET write at the lookup token, and in this study's prompts the lookup token is always the colon that ends the
# prompt. These tables look at the updates before any text is generated, to separate effects of the method, the model and the implementation.

# %% tags=["parameters", "hide-input"]
subject: str = "smollm2-135m"  # whose measurements are shown
results: str = "results"  # folder of the measurements

# %% tags=["hide-input"]
from pathlib import Path

import pandas as pd

from clme_lib.study.appendices import statistics, weight_updates

measured = pd.read_csv(Path(results, "diagnosis", f"{subject}.csv"))
caption = f"Updates on selection cases of {subject}, means over cases."
weight_updates.diagnosis_table(measured, label="tab-diagnosis", caption=caption)

# %% [markdown]
# *Learnt* is the loss at which the optimisation of {eq}`eq-rewriting` stopped (with its other terms); *NLL* the mean cross-entropy of the
# target's tokens in nats, read by the unedited and then by the edited subject; *first* that of the target's first token
# alone; *norm* the Frobenius norm of the update; *reach* how far the update moves the output of the edited matrices at
# the neighbours' colons, as a share of how far it moves it at the edit prompt's own.
#
# **The KL term holds the first token back.** Its anchor is the edit prompt itself (the released program's choice; ROME and MEMIT were
# published with a prompt about the subject instead), so it asks for the old distribution exactly where the target's
# first token should win. A target of a dozen tokens gives that token a twelfth of the likelihood term, about as much as the KL term
# weighs. With the paper's factor the later tokens are learnt and the first is not, and a text that starts with another token does
# not match. This is why the selected values of ROME and MEMIT have no KL term.
#
# **A colon is a colon.** The update is written along the key of the lookup token, and all prompts of a dataset end in the same token after
# the same suffix, so their keys are close. *Reach* is how much of the edit arrives at the neighbours: nearly all of it, whether or not
# the target was learnt. It comes from where these methods write.
#
# PMET learns the same in both of its rows, which differ in the weight of the write: more is written with the selected one, and the first token is further off.
#
# ## PMET taken apart

# %% tags=["hide-input"]
measured = pd.read_csv(Path(results, "diagnosis", f"{subject}.pmet.csv"))
caption = "PMET's vectors learnt without the KL term, written at the last layers of its window; CNLE selection cases."
weight_updates.pmet_table(measured, label="tab-pmet-parts", caption=caption)

# %% [markdown]
# Learnt alone and written into block 8 alone, by a write that puts nearly all of the residual in place (weight 200), the MLP's vector makes
# the target about as likely as it was while it was learnt: the code does what the formula says. Two steps of the method undo that on this
# model. *The attention's vector is learnt beside it and then left out*: the same write then misses the first token. *The residual is spread by
# square roots*: it is read from the MLP's output of block 8, in which what blocks 4 to 7 put into the stream does not show, so that five
# writes of $r/\sqrt5$ to $r/\sqrt1$ put up to $3.2\,r$ into it. In PMET the first falls short and the second overshoots.
#
# ## How much text the statistics need
#
# MEMIT's writes with statistics of ten and of forty tokens per dimension of the key, each against four times as many. Ten are too few
# here, because tokens of one document resemble each other; forty are the default.

# %% tags=["hide-input"]
measured = pd.read_csv(Path(results, "statistics", f"{subject}.csv"))
caption = "The same keys under statistics of so many tokens, and of four times as many."
statistics.statistics_table(measured, label="tab-statistics", caption=caption)

# %% [markdown]
# *Cosine* is the smallest over the cases, between the two write directions; *share* the part of a residual that a write puts at its own key
# (mean), then the same with four times the tokens; *difference* the largest relative difference of the two.
