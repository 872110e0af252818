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
# (sec-scorecard)=
# # Scorecard
#
# Does the paper replicate? Each row gives one of its claims, in our words and with the paper's figures where we know them, next to what this
# study's records say on each embedded model. The models and the data are not the paper's ([](#sec-threats)). *Replicated* means that the claim is also true here, and *reversed* that the
# opposite is true; neither says anything about the paper's own models. *Undecided* means that these cases show neither, *not testable here* that this study lacks what a test needs, and *invalid by a defect* that the released program does not measure what is claimed.

# %% tags=["parameters", "hide-input"]
subjects: str = "smollm2-135m,smollm2-135m-code"  # comma-separated subjects whose published runs are judged
results: str = "results"  # folder of the published runs and measurements

# %% tags=["hide-input"]
from pathlib import Path

import torch
from IPython.display import Markdown

from clme_lib.study import scorecard
from clme_lib.support.display import inline

evidence = scorecard.load_evidence(Path(results), subjects.split(","))

# %% tags=["hide-input"]
sentences = []
for subject, of_verdicts in scorecard.counts(evidence).items():
    listed = ", ".join(f"{count} {verdict}" for verdict, count in of_verdicts.items())
    sentences.append(f"Of the comparisons made on {subject}: {listed}.")
Markdown(inline(" ".join(sentences)))

# %% tags=["hide-input"]
caption = (
    "The paper's claims (F1 to F3 are the findings named in its abstract and introduction) and what this study's records say. Each claim is compared separately for each "
    "dataset, or for each editor. p values are two-sided, with Holm's correction over the whole table; only where an editor is claimed to be the best, the correction is over its comparisons with the other five. Where two scores should be equal, replicated means that the 95% interval rules out a loss of more "
    f"than {scorecard.MARGIN:.0f} points. Some claims have no figure from the paper, because we do not have the paper's tables."
)
scorecard.scorecard_table(evidence, label="tab-scorecard", caption=caption)

# %% [markdown]
# **Why some claims are reversed.** *The task* (F3): the embedded CNLE was written by hand for this study, with short intents and targets of a single line; the embedded CSNE is mined, as the paper's datasets are. Which of these
# differences makes it easier was not measured. *The ablations*: in the paper neither part of A-GRACE helps on its own. Here an encoder on the last token's key
# does help (w/o Mean), and so does the mean key without an encoder (w/o CL) where the rephrased prompt is the same function with other names. *Generalization*: on the chat model MALMEN, the only
# one of the six that is trained on rephrased prompts, generalizes in most cases, but leaves all five neighbours unchanged in no case.
#
# [](#rq3) shows what an encoder does beyond a larger radius.
#
# (defect)=
# ## A finding in itself: the released program measures A-GRACE's specificity on the unedited model
#
# In the authors' program (commit `30584f3`), A-GRACE's codebook is consulted during the first call of `generate` after an edit, but not in later calls:
#
# - `AGRACE.py`: A-GRACE's query is the mean of the states up to a position that is remembered between calls. `generate` resets the position to −1, and the flag that would trigger its recomputation
#   (`ensure_replace_token_loc`) stays set. The upper end of the mean is then min(−1, *L* − 1) + 1 = 0. This is a mean over no states, which is *not a number*.
# - A distance to such a query is not a number either, and it never compares as at most the radius: the codebook never fires.
# - `clme_evaluate.py`: the first call generates the texts for effectiveness and generalization, the later calls those for specificity and fluency.
#
# So effectiveness and generalization are measured with the edit, specificity and fluency without it. Three lines reproduce the arithmetic, on any states:

# %%
states, key, radius = (
    torch.randn(12, 8),
    torch.randn(8),
    1e9,
)  # a prompt's states; an edit's key; a radius that reaches everything
end = min(-1, len(states) - 1) + 1  # the remembered position is -1
query = states[:end].mean(dim=0)
fires = bool((query - key).norm() <= radius)
query, fires

# %% [markdown]
# With `preset="compat"` this study reproduces the defect ([](#sec-departures)); by default the codebook is consulted for every text.

# %% tags=["hide-input"]
lines = [
    f"{subject}, {outcome.data}. {claim.says} Here: {outcome.here}."
    for claim, of_subjects in scorecard.judged(evidence)
    for subject, outcomes in of_subjects.items()
    for outcome, verdict, _ in outcomes
    if verdict == scorecard.INVALID
]
Markdown("\n".join(f"- {inline(line)}" for line in lines))

# %% [markdown]
# *Effect on the paper's Table VI*: if this program computed them, the rows of A-GRACE and of w/o CL show the unedited model's specificity and fluency, whatever the edit does to neighbours; their effectiveness and generalization are not
# affected. W/o Mean reads the last token and is not affected. The claim that A-GRACE keeps GRACE's specificity is therefore not supported by any measurement; with the defect repaired, A-GRACE does not keep it here ([](#tab-rq3-presets)).
# GRACE's own specificity is not in doubt: its key is read again for every text.
