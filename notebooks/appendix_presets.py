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
# # Appendix D: effects of the released program's defects
#
# This appendix measures the defects of the released program that `preset="compat"` reproduces ([](#sec-method) describes them): the padding and the missing leading space each alone and together, MALMEN's two only together, and the token budget in a column of its own, on selection cases with the
# embedded subject's values. The first row of each dataset has no defects.

# %% tags=["parameters", "hide-input"]
subject: str = "smollm2-135m"  # subject whose measurements are shown
results: str = "results"  # folder of the measurements

# %% tags=["hide-input"]
from pathlib import Path


from clme_lib.study.appendices import selection
from clme_lib.study.tables import read_csv

files = Path(results, "presets").glob(f"{subject}.*.csv")
measured = {file.stem.removeprefix(f"{subject}."): read_csv(file, *selection.PRESET_COLUMNS) for file in files}
caption = (
    "Exact match (times 100) of effectiveness and generalization, the share of neighbours left unchanged, the loss at the end, and effectiveness "
    "when a text may only have as many tokens as the released program allows."
)
selection.preset_table(measured, label="tab-presets", caption=caption)

# %% [markdown]
# **Padding.** In every row of a batch except the longest, the released program reads too far to the left. The vector is therefore learnt at a token in the middle of the prompt, for misplaced
# labels, and then written at the colon. The loss reached is about twice (PMET) to six times as large, and few or no edits succeed.
#
# **Missing leading space** (targets alone). A target tokenised without the space before it starts with a token that the model does not write there. This costs ROME and MEMIT less than the padding does, and less on CSNE
# than on CNLE; it eliminates PMET's few successful edits.
#
# **Wrong token positions** (MALMEN). MALMEN was trained and used with both of its defects or with neither: with both, no edit succeeds on either dataset. *Loss* is that of the unedited model, read
# with the target as tokenised in each setting, because MALMEN's edit is computed from the gradient of that loss.
#
# **Token budget.** When a text may only be as long as its target tokenised alone, hardly any text is cut off before its end: the last column differs from *Eff.* by at most one case.
#
# Specificity does not distinguish the settings, except for MALMEN on CNLE: these editors leave hardly any neighbour unchanged here, with or without the defects.
# {ref}`weight-editors` shows why. MALMEN with its defects leaves a fifth of CNLE's neighbours unchanged, through an edit that has none of the intended effect. All
# results are for one model of 135M parameters; `clme measure presets --subject NAME --editor rome --out table.csv` measures another. A-GRACE's presets are compared in {ref}`rq3`.
