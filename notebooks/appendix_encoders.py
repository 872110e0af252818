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
# (encoders)=
# # Appendix E: A-GRACE's encoder
#
# What A-GRACE's encoder is asked: does the radius around an edit's key hold its rephrased prompt, and none of its neighbours? Each encoder was
# trained on one half of a whole dataset, a few hundred cases (layer 20's mean keys, w/o Mean: last-token keys), and asked about the other, with the radius that the editor uses.

# %% tags=["parameters", "hide-input"]
subject: str = "smollm2-135m"  # whose measurements are shown
results: str = "results"  # folder of the measurements

# %% tags=["hide-input"]
from pathlib import Path

import pandas as pd
from IPython.display import Markdown

from clme_lib.study.appendices import encoder_settings
from clme_lib.support.display import Markup

measured = pd.read_csv(Path(results, "encoders", f"{subject}.csv"))
caption = Markup(
    "Encoders by setting. Balanced accuracy of <em>within the radius</em> on the half that was not trained on, means of both halves (0.5 is what any "
    "constant gets), at the editors' radius and at the radius that would be best there; and the shares of rephrased and neighbour prompts "
    "within the radius."
)
encoder_settings.setting_table(measured, label="tab-encoders", caption=caption)

# %% [markdown]
# **The released margin is the radius.** With margin 1 the loss pushes a neighbour out to a distance of 1 and no further, and
# what is at most 1 away counts as inside. On CNLE all neighbours stay inside for the first epochs; the
# balanced accuracy is that of a constant, and after five epochs without improvement the training ends. With patience 30 training leaves this plateau, and so
# it does with the more cases of RQ3's sweep, whose encoders learn from both halves. A margin above the radius leaves room between the two.
#
# **The datasets differ.** A rephrased CSNE prompt is the same function with other variable names, and finding it is easy; a rephrased CNLE prompt has other
# words, and its neighbours were chosen because their words resemble it.
#
# The margins of the embedded subject were chosen by the *held out* column, the training cases that choose the epoch: the best of the margins of A-GRACE for each dataset.
# Its ablation has the same. Since both halves count, cases that RQ3 edits are among them: one number for each dataset was chosen with their help. The epoch is chosen by held-out training cases, in the paper by the cases that are edited afterwards
# (*the edited cases*); the difference is in the table.

# %% tags=["hide-input"]
margins = encoder_settings.compared_sizes(measured)["margin"].unique()
caption = f"A-GRACE's encoder (margin {', '.join(f'{margin:g}' for margin in margins)}) by training size."
encoder_settings.size_table(measured, label="tab-encoder-sizes", caption=caption)

# %% [markdown]
# The paper trains on 10,528 CNLE cases. On the few that are embedded here, more of them help; where training ends after six epochs as it began,
# the first five epochs did not improve on it.

# %% tags=["hide-input"]
Markdown(
    f"`clme measure encoders --out table.csv` remakes the table: it trains {len(measured)} encoders, which take seconds each once the prompts "
    "have been read."
)
