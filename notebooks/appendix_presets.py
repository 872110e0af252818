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
# (presets)=
# # Appendix D: what the released program's defects do
#
# The defects of the released program that `preset="compat"` reproduces ([](#sec-method) describes them), each alone and both together (MALMEN's together only), on selection cases with the
# embedded subject's values. A dataset's first row has none of them.

# %% tags=["parameters", "hide-input"]
subject: str = "smollm2-135m"  # whose measurements are shown
results: str = "results"  # folder of the measurements

# %% tags=["hide-input"]
from pathlib import Path

import pandas as pd

from clme_lib.study.appendices import selection

files = Path(results, "presets").glob(f"{subject}.*.csv")
measured = {file.stem.removeprefix(f"{subject}."): pd.read_csv(file) for file in files}
caption = (
    "Exact match (times 100) of effectiveness and generalization, the share of neighbours left unchanged, the loss at the end, and effectiveness "
    "when a text may only have as many tokens as the released program grants it."
)
selection.preset_table(measured, label="tab-presets", caption=caption)

# %% [markdown]
# **Padding.** The released program reads every row of a batch but the longest too far left, so the vector is learnt at a token in the middle of the prompt, for labels
# that are out of place, and then written at the colon. The loss reached is about twice (PMET) to six times as large, and few edits succeed, or none.
#
# **Targets alone.** A target tokenised without the space before it starts with a token that the model does not write there. This costs ROME and MEMIT less than the padding does, and less on CSNE
# than on CNLE; of the few edits of PMET that hold otherwise it leaves none.
#
# **Cached tokens.** MALMEN was trained and used with both of its defects or with neither: with both, not one edit holds on either dataset. *Loss* is the unedited model's, read
# with the target as the setting tokenises it, because MALMEN's edit is computed from that loss's gradient.
#
# **The budget.** When a text may only be as long as its target tokenised alone, hardly any is cut off before its end: the last column differs from *Eff.* at most by a case.
#
# Specificity does not tell the settings apart, but for MALMEN on CNLE: these editors leave hardly any neighbour unchanged here, with the defects or without.
# {ref}`weight-editors` shows why. MALMEN with its defects leaves a fifth of CNLE's neighbours unchanged, by an edit that does nothing it should. All
# of this is one model of 135M parameters; `clme measure presets --subject NAME --editor rome --out table.csv` measures another. A-GRACE's presets are compared in {ref}`rq3`.
