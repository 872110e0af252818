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
# How well does each editor change what it should, generalize the change to rephrased prompts, and leave everything else unchanged?
# Each case is edited on its own; the edited model then writes a continuation of the edit prompt (effectiveness), of the
# rephrased prompt (generalization) and of the five neighbours (specificity), and two sampled texts (fluency).
# The measures are defined in [](#sec-method).

# %% tags=["parameters", "hide-input"]
subject: str = "smollm2-135m"  # registered name, Hugging Face id or folder
dataset: str = "cnle,csne"  # comma-separated
editors: str = "none,ft-l,grace"  # comma-separated; `clme list` shows all
cases: int = 8  # number of cases per dataset
sample: int = 0  # number of the random sample of cases
out: str = "runs/rq1"  # the run's folder; running again resumes it
beside: str = ""  # folder of another subject's run to show beside this one
device: str = "auto"  # auto, cpu, cuda
dtype: str = "auto"  # auto (float32), float32, bfloat16, float16

# %% tags=["hide-input"]
import clme_lib as clme
from clme_lib.study.config import ReportConfig

# any other field of the configuration can be passed by its name as well: `clme run --help` lists them
config = clme.config_from_notebook(globals(), ReportConfig)

# %% tags=["hide-input"]
import pandas as pd
from IPython.display import Markdown, display

from clme_lib.datasets.base import get_dataset
from clme_lib.study import rq1 as report
from clme_lib.study.tables import to_markdown
from clme_lib.support.display import Markup, code_block, inline, inline_code

records = clme.run(config)

# %% [markdown]
# ## Main results

# %% tags=["hide-input"]
caption = Markup(
    f"Proficiency on {inline(', '.join(records['subject'].unique()))} (the paper's Table IV): effectiveness (Eff.), generalization (Gen.), "
    "specificity (Spec.) and fluency (FL.) by exact match, BLEU and ROUGE-L (R-L), times 100, with 95% intervals below; <em>kept</em> is the "
    "share of neighbours left unchanged. Bold marks the best edited rows of a dataset and those that are not significantly worse on the "
    "same cases (McNemar's exact test for exact match, otherwise Wilcoxon's signed-rank test, with Holm's correction over the table)."
)
report.proficiency_table(records, label="tab-rq1-proficiency", caption=caption)

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Exact match by editor and measure; lines are 95% Wilson intervals, and the number of cases is given under each bar.", "name": "fig-rq1-proficiency"}}
import matplotlib.pyplot as plt

report.proficiency_figure(records)
plt.show()

# %% tags=["hide-input"]
paragraphs = []
for data, shown in report.findings(records).items():
    best = {measure: f"{inline(' and '.join(names))}: {share}" for measure, (names, share) in shown["best"].items()}
    text = (
        f"({inline(data)}). Highest effectiveness: {best['effectiveness']}. Best generalization: {best['generalization']}. "
        f"Most specific (all five neighbours unchanged): {best['specificity']}. "
    )
    if careful := shown["careful"]:
        farthest = max(careful, key=careful.get)
        half = "effectiveness and specificity of at least 50%"
        share = f"{100 * careful[farthest]:.1f}%"
        if len(careful) == 1:
            text += f"Only {inline(farthest)} has {half}; its generalization is {share}."
        else:
            text += f"{inline(' and '.join(careful))} have {half}; the best generalization among them is {share} ({inline(farthest)})."
    else:
        text += "No editor has both effectiveness and specificity of at least 50%."
    paragraphs.append(f"> **Finding** {text}")
Markdown("\n\n".join(paragraphs) or "_Nothing to read yet: these records have no edited case with scores._")

# %% tags=["hide-input"]
if config.beside:
    beside = clme.load_run(config.beside)
    beside = beside[~beside["editor"].str.contains("-wo-")]  # ablations are RQ3's
    # editors that only the other run's tables need, such as A-GRACE, whose chapter is RQ3
    others = clme.load_run(config.out, editors=[name for name in beside["editor"].unique() if name not in config.editors])
    both = pd.concat([records, others[others["case_id"].isin(records["case_id"])], beside])
    names = " and ".join(both["subject"].unique())
    caption = f"{names} side by side: exact match of effectiveness and generalization, and the share of neighbours left unchanged, with 95% intervals."
    display(report.subjects_table(both, label="tab-rq1-subjects", caption=caption))
    caption = (
        f"Proficiency on {', '.join(beside['subject'].unique())}, as in the first table, of all editors with records of it; n says on how many cases. Rows with different n are compared "
        "on the cases that both have; with few cases hardly any difference is significant, so bold there often means that there are too few to tell."
    )
    display(report.proficiency_table(beside, label="tab-rq1-beside", caption=caption))

# %% [markdown]
# ## Prompt or edit?
#
# Without any editing, the case can be put into the prompt (*in context*). It costs tokens at every prompt (RQ2 counts them) and changes nothing in the model. Does editing do better?

# %% tags=["hide-input"]
runs = {"": both[both["subject"] == records["subject"].iloc[0]], "-beside": beside} if config.beside else {"": records}
metrics = {"effectiveness_em": "After the edit prompt", "generalization_em": "After the rephrased prompt", "specificity_rate": "In neighbours left unchanged"}
paragraphs = []
for rows in runs.values():
    for data, compared in report.prompt_findings(rows).items():
        sentences = []
        for name, words in metrics.items():
            better, worse = (inline(", ".join(compared["metrics"][name][direction]) or "none") for direction in ("better", "worse"))
            sentences.append(f"{words}, better: {better}; worse: {worse}.")
        ahead = inline(", ".join(compared["ahead"]) or "none")
        paragraphs.append(
            f"> **Finding** ({inline(data)}, {inline(rows['subject'].iloc[0])}). Compared with *in context*: {' '.join(sentences)} Significantly better in at least one of the three and worse in none: **{ahead}**."
        )
Markdown("\n\n".join(paragraphs) or "_The case in the prompt is not among these records' editors._")

# %% tags=["hide-input", "hide-output"]
for label, rows in runs.items():
    caption = (
        f"Differences from the case in the prompt ({rows['subject'].iloc[0]}), in points, on the n cases that both edited, with 95% intervals; p of McNemar's exact test or Wilcoxon's signed-rank "
        "test, with Holm's correction over the table. With few cases hardly any difference is significant."
    )
    display(report.prompt_table(rows, label=f"tab-rq1-prompt{label}", caption=caption))

# %% [markdown]
# ## Task sensitivity: CSNE against CNLE
#
# The paper's Table V asks whether an editor is as effective on code targets as on natural-language ones.

# %% tags=["hide-input"]
caption = "Effectiveness on CSNE → on CNLE and its relative change (the paper's Table V, where every change is a decrease); an editor whose CSNE score is 0 has none."
report.transfer_table(records, label="tab-rq1-transfer", caption=caption)

# %% tags=["hide-input"]
directions = report.transfer_findings(records)
compared = sum(map(len, directions.values()))
if compared:
    parts = [
        f"{len(directions[name])} of {compared} ({inline(', '.join(directions[name]))}) {words}"
        for name, words in (
            ("more", "are more effective on CNLE than on CSNE"),
            ("less", "are less effective there"),
            ("alike", "cannot be distinguished with these cases"),
        )
        if directions[name]
    ]
    verdict = "the same here" if len(directions["less"]) == compared else "*reversed* here" if directions["more"] and not directions["less"] else "not the same here"
    text = (
        f"> **Finding.** In the paper every editor is less effective on CNLE (its F3): the direction is {verdict}. By exact match {'; '.join(parts)} (Fisher's exact test, two-sided, Holm over the "
        "editors). The datasets are not the paper's: here CNLE's targets are short lines of common form, CSNE's are descriptions that people wrote, and both differ from the paper's in length and in their "
        "likelihood under the unedited model. This result shows that the order of the tasks depends on the data; it does not show that the paper's order is wrong."
    )
else:
    text = "_The order of the tasks cannot be read from these records: no editor has cases of both._"
Markdown(text)

# %% [markdown]
# ## What the protocol hides
#
# The paper's protocol writes exactly as many tokens as the target has. This gives away the length of the answer, never tests whether the model
# stops, and compares strings where code could be run. For the free scores the edited models write up to 64 tokens, as they would for a user,
# and the text is cut at its first line break (for code, at the end of its first statement); [](#sec-free) defines the scores. Records made
# before the free scores existed contain no such texts, and CSNE records contain no texts at all. The tables show what can be computed from each record.

# %% tags=["hide-input"]
def show_runs(table_of, name, caption, nothing):
    """A table for each subject's records, or a sentence if they are all empty."""
    tables = [table_of(rows, label=f"tab-rq1-{name}{label}", caption=f"{caption} Subject: {rows['subject'].iloc[0]}.") for label, rows in runs.items()]
    for table in [table for table in tables if len(table.data)] or [Markdown(f"_{nothing}_")]:
        display(table)


caption = (
    "Scores beyond the paper's, times 100 with 95% intervals below; intervals and bold as in the first table. Scores that no record has are left out, "
    "and so are rows without any score."
)
show_runs(report.free_table, "free", caption, "These records have no such scores.")

# %% tags=["hide-input"]
caption = (
    "The paper's score → the free or executed score of the same cases, and below the change in points with its 95% interval (McNemar's exact "
    "test or Wilcoxon's signed-rank test, with Holm's correction over the table). Spec. kept counts a new or missing code fence as a change of the "
    "neighbour; no fence does not."
)
show_runs(report.protocol_table, "protocol", caption, "These records have no free scores in addition to the paper's.")

# %% [markdown]
# A codebook's generalization has two factors. The first is whether the codebook fires on a rephrased prompt, which depends on the encoder and the radius. The second is
# whether the value still makes the model write the target there, which depends on the value: the encoder decides which prompts count towards this factor, but not what is written.

# %% tags=["hide-input"]
caption = "Generalization of the codebooks by factor: shares of the rephrased prompts with 95% intervals; the second share is of those where the codebook fired."
show_runs(report.reach_table, "reach", caption, "No codebook was queried in these records.")

# %% tags=["hide-input"]
caption = "What happens when the snippets written after the edit prompt are run, in percent of the cases that have a check."
show_runs(report.failure_table, "failures", caption, "No code from these records was run.")

# %% [markdown]
# ## Example outputs
#
# Line breaks are shown as ⏎. Texts are as long as the target; those after a neighbour have 16 tokens and should match the text in the unedited row.

# %% tags=["hide-input"]
with_texts = clme.load_cases("cnle" if "cnle" in config.dataset else config.dataset[0], config.source)
columns = {
    "effectiveness": "writes after the edit prompt",
    "generalization": "after the rephrased prompt",
    "specificity": "after the neighbour",
}
parts = []
for number, (case, written) in enumerate(report.examples(records, with_texts), 1):
    rephrased, neighbour = (inline_code(get_dataset(case.dataset).text(prompt)) for prompt in (case.rephrased[0], case.unrelated[0]))
    parts.append(
        f"**Example {number}** (case {case.case_id})\n\n"
        f"edit prompt:\n\n{code_block(case.prompt)}\n\n"
        f"target:\n\n{code_block(case.target)}\n\n"
        f"rephrased: {rephrased}; a neighbour: {neighbour}\n\n" + to_markdown(written.rename(columns=columns))
    )
Markdown("\n\n".join(parts) or "_These records keep no texts to show._")

# %% [markdown]
# **Threats.** The models are small and the data embedded; on the code model the editors beyond the paper have fewer cases, as *n* shows, except for the case in the prompt. For these editors, fewer cases were also
# used to select the values ({ref}`selection`). The chat model's specificity counts a lost code fence as
# damage ([](#sec-threats)).
#
# [](#weight-editors) examines weight updates before any text is generated, to separate effects of the method, the model and the implementation.

# %% [markdown]
# ## Your own question
#
# The tables above are computed from a pandas table with one row per edited case; [](#sec-records) describes its columns.

# %%
means = records.groupby(["dataset", "editor"], sort=False)[["effectiveness_em", "generalization_em", "specificity_em"]].mean()
(100 * means).round(1)

# %% tags=["hide-input"]
from clme_lib.study import spot_check

if config.within:
    compared = spot_check.compare(clme.load_run(config.out), clme.load_run(config.within))
    agreement = spot_check.agreement_table(compared, label="tab-spot-check", caption="Texts generated again on this machine.")
    differences = [
        f"Case {text.case_id} of {inline(text.dataset)}, {inline(text.editor)}, {text.measure}; published, then here:\n\n"
        f"{code_block('(only its hash is published)' if text.published is None else text.published)}\n\n────\n\n{code_block(text.here)}"
        for text in compared.differences
    ] or ["Every text came out the same, character by character."]
    display(Markdown("\n\n".join(["## The same cases, published and here", agreement.to_myst(), *differences])))
