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
# (benchmark)=
# # Benchmark
#
# CLMEEval {cite:p}`li2025model` has two datasets. **CNLE** edits natural language → Python, from CoNaLa
# {cite:p}`yin2018conala`; **CSNE** edits Python → natural language, from CodeSearchNet {cite:p}`husain2019codesearchnet`. A case has
# an edit prompt and its target, one rephrased prompt, and the five unrelated prompts nearest to the edit prompt.

# %% tags=["parameters", "hide-input"]
builds: str = ""  # folders made by `clme data build`, separated by spaces, whose tables and samples to show as well
samples_of: str = "cnle"  # comma-separated datasets to show cases of; the texts of CSNE are not ours to publish
results: str = "results"  # folder of the measurements

# %% tags=["hide-input"]
from pathlib import Path

from IPython.display import Markdown

from clme_lib.datasets import embedded_cnle, embedded_csne
from clme_lib.datasets.construction import pipeline
from clme_lib.datasets.registry import load_cases
from clme_lib.study import benchmark

shown = {"CNLE": load_cases("cnle")}
if embedded_csne.is_mined():
    shown["CSNE"] = load_cases("csne")
built = {pipeline.built_cases(folder)[0].dataset: folder for folder in map(Path, builds.split())}
shown |= {f"{name.upper()} (built)": pipeline.built_cases(folder) for name, folder in built.items()}

# of a dataset that was built as well, cases of the built one are shown
samples = {name.split()[0]: benchmark.sample_cases(cases) for name, cases in shown.items()}
samples = {name: tables for name, tables in samples.items() if name.lower() in samples_of.split(",")}

# %% [markdown]
# ## Three sources
#
# `embedded`
# : Used in this book. No network is needed beyond the package index.
#
# `published`
# : The authors' files, from Zenodo ([10.5281/zenodo.12818365](https://doi.org/10.5281/zenodo.12818365)), checked against the record's
#   checksums. 21,055 CNLE and about 16,000 CSNE cases. The download is implemented and tested against a local stand-in;
#   none of the results in this book uses it yet.
#
# a path
# : Any JSON file in the authors' layout.
#
# ## Embedded CNLE

# %% tags=["hide-input"]
targets, pool = embedded_cnle.read_rows("cnle-targets"), embedded_cnle.read_rows("cnle-pool")
snippets = [row["snippet"] for row in targets]
median = sorted(map(len, snippets))[len(snippets) // 2]
calls = set().union(*map(embedded_cnle.calls, snippets))
Markdown(f"""{len(targets)} targets and {len(pool)} non-targeted pairs, written for this study in CoNaLa's style: an intent with back-quoted
names, a one-line snippet (median {median} characters), and, for targets, a rephrased intent. The targets use
{len(calls)} distinct calls. Tests check that every snippet parses, that the module attributes it names exist, and that no two snippets
share more than 70% of their tokens. The neighbours are the five nearest pool intents by TF-IDF.""")

# %% [markdown]
# ## Embedded CSNE

# %% tags=["hide-input"]
Markdown(f"""{embedded_csne.TARGETS} targets and a pool of {embedded_csne.POOL}, mined on the reader's machine from the pinned packages that the study installs
anyway: functions of at most 256 tokens, with docstring and comments removed, the docstring's first sentence as the description,
near-duplicates removed, and no package above 15%. The repository contains no mined code, only the set's SHA-256, which is checked.
The rephrased prompt is the same function with its variables renamed by distributional similarity of identifiers. A check verifies
that renaming leaves the syntax tree and the symbol table the same up to names. At least two of the five neighbours come from
another package.""")

# %% tags=["hide-input"]
caption = "Lengths in words and symbols (the paper's Table III)."
benchmark.length_table(shown, label="tab-lengths", caption=caption)

# %% [markdown]
# ## Three cases
#
# CNLE:

# %% tags=["hide-input"]
Markdown(samples.get("CNLE", ""))

# %% [markdown]
# CSNE:

# %% tags=["hide-input"]
Markdown(
    samples.get(
        "CSNE",
        "_CSNE's texts are not ours to publish, so none are shown here; where_ `make book` _was run, it has mined the set and shows three cases._",
    )
)

# %% [markdown]
# (building)=
# ## Building CNLE and CSNE from their sources
#
# ```{figure} ../../book/_static/pipeline.svg
# :name: fig-pipeline
# :width: 100%
#
# The stages of both constructions (CNLE selects neighbours before rephrasing; dashed stages are optional). Every arrow is a JSON Lines file with its settings, counts and input hashes beside it.
# ```
#
#     clme data build cnle --source hub --targets 21055 --out data/cnle \
#       --model MODEL --endpoint http://localhost:8000/v1 \
#       --encoder Snowflake/snowflake-arctic-embed-m
#     clme data build csne --source hub --out data/csne-offline \
#       --tokenizer microsoft/codebert-base
#     clme data fine-tune data/csne-offline --out data/codebert-search
#     clme data build csne --source hub --out data/csne \
#       --tokenizer microsoft/codebert-base --encoder data/codebert-search \
#       --names microsoft/codebert-base-mlm
#
# CNLE queries a language model, behind any OpenAI-compatible endpoint, for two things: how relevant a mined snippet is to its intent (five levels, temperature
# 0), and a rephrased version of each chosen intent. Answers are stored as they arrive; `--budget` limits tokens and `--concurrency` parallel requests. CSNE
# renames identifiers by a masked language model's predictions in context; a variant counts only if its syntax tree, symbol tables and byte code match the
# function's up to names. The encoder for its neighbours is fine-tuned on code search, using functions that an offline construction did not target. Without `--model`,
# `--encoder` and `--names` the same stages run offline. They then use a small code model's relevance scores (below), second wordings that are given, TF-IDF, and names with similar usage in the pool.
# `--source` also accepts files of CoNaLa or CodeSearchNet. A killed command resumes where it stopped; a command with other settings is refused
# until the affected stages are removed.

# %% tags=["hide-input"]
which = f"those of {built['cnle'].name}" if "cnle" in built else "the embedded pairs by the offline scorer"
caption = f"Pairs by relevance (the paper's Table II): {which}."
measured = Path(results, "benchmarks", "relevance.levels.csv")
benchmark.level_table(benchmark.level_counts(built.get("cnle", measured)), label="tab-levels", caption=caption)

# %% [markdown]
# `make site BUILDS="data/cnle data/csne"` adds what was built there to the tables and samples of this chapter. The embedded pairs were written, not mined, so their table shows how strict the offline scorer is, not how good the pairs are.
#
# Without a language model, a pair's relevance is how much more likely, per token, the snippet is after its own intent than after another, according to the embedded code
# subject. The thresholds come from pairs that imitate mined ones. They were written and labelled for this study, then labelled again without looking at the first labels:
#
# ```{csv-table} The offline scorer, the share of words in common (which it replaces) and the second labels, each compared with the first labels. Kappa has quadratic weights; each fifth of the pairs is judged by thresholds from the others.
# :name: tab-relevance
# :file: ../benchmarks/relevance.csv
# :header-rows: 1
# ```
#
# The labels are easy to agree on because each pair was written for its level. They are hard for words in common: right snippets often share no words with their
# intent, while wrong ones do. The model separates unrelated pairs from the others, but hardly separates the upper levels from each other: it is a stand-in for use where no
# language model is available. CoNaLa pairs that people wrote or corrected are relevant, and of these it puts fewer in the two lowest levels than words in common do.
# Of the same snippets after another row's intent, however, it puts more in the two highest levels:
#
# ```{csv-table} Levels that both scorers give 500 annotated pairs of CoNaLa, and the same snippets after the next row's intent.
# :name: tab-relevance-conala
# :file: ../benchmarks/relevance.source.csv
# :header-rows: 1
# ```
#
# To measure human agreement with a scorer,
# `clme data labels data/cnle labels.csv` samples as many pairs as a margin of 5 points at 95% confidence requires. Once two people have filled
# in their labels, it prints Cohen's kappa between them and with the scorer.
#
# `clme data check FILE` reports on any file in the published layout: counts and lengths, duplicates, neighbours that are targeted or too close,
# code that does not parse, targets that a measure cannot score, missing answers. It fails if there is an error.
#
# ```{csv-table} Seconds and peak memory at synthetic sizes with one thread, and the paper's sizes by proportional extrapolation (intents: 20,000 targets against 500,000; functions: 16,000 against 440,000; 16,000 renamings).
# :name: tab-construction-scale
# :file: ../benchmarks/construction.csv
# :header-rows: 1
# ```
#
# The full similarity matrix is never stored: scikit-learn's index computes exact cosines in parts and keeps each target's best. Offline renaming compares the names of
# at most 20,000 functions of the pool. The smallest sizes extrapolate worst,
# because they include the fixed cost of a start. `.venv/bin/python benchmarks/construction.py` repeats the measurement; it does not include the time that an encoder takes to read the texts.
#
# ## What differs from the paper's sets

# %% tags=["hide-input"]
Markdown(f"""| | Paper | Embedded |
| --- | --- | --- |
| CNLE source | mined CoNaLa, relevance scored by an LLM | written for this study |
| CNLE rephrasing | by an LLM | written with the pair |
| CSNE source | CodeSearchNet | installed Python packages |
| CSNE renaming | ALERT, substitutes from CodeBERT | distributional substitutes, verified |
| neighbours | Arctic-embed, fine-tuned CodeBERT | TF-IDF on split identifiers |
| size | 21,055 and 16k | {len(targets)} and {embedded_csne.TARGETS} |""")

# %% [markdown]
# Packages like these are probably in the training data of most code models, and so is CodeSearchNet. The unedited row of a table shows how often a subject
# writes the target anyway ({numref}`tab-rq1-proficiency`). Thirty cases of each dataset are reserved for
# choosing hyperparameters and are not edited in any run of RQ1 or RQ3.
