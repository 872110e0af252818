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
# an edit prompt and its target, one rephrased prompt, and five unrelated prompts nearest to it.

# %% tags=["parameters", "hide-input"]
builds: str = ""  # folders that `clme data build` made, separated by spaces: their tables and samples are shown as well
samples_of: str = "cnle"  # comma-separated datasets of which cases are shown; the texts of CSNE are not ours to publish
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
# : What this book shows. No network is needed beyond the package index.
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
names, a one-line snippet (median {median} characters), and, for targets, another wording of the intent. The targets use
{len(calls)} distinct calls. Tests check that every snippet parses, that the module attributes it names exist, and that no two snippets
share more than 70% of their tokens. Unrelated prompts are the five nearest pool intents by TF-IDF.""")

# %% [markdown]
# ## Embedded CSNE

# %% tags=["hide-input"]
Markdown(f"""{embedded_csne.TARGETS} targets and a pool of {embedded_csne.POOL}, mined on the reader's machine from the pinned packages that the study installs
anyway: functions of at most 256 tokens, docstring and comments cut out, the docstring's first sentence as the description,
near-duplicates removed, no package above 15%. Nothing mined is in the repository; the set's SHA-256 is, and is checked.
The rephrased prompt is the same function with its variables renamed, chosen by how alike names are used in the corpus and
verified to leave the syntax tree and the symbol table the same up to names. At least two of the five neighbours come from
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
        "_CSNE's texts are not ours to publish, so none is shown here; where_ `make book` _was run, it has mined the set and shows three cases._",
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
# The stages of both constructions (CNLE takes neighbours before rephrasing; a dashed stage is not always there). Every arrow is a JSON Lines file with its settings, counts and input hashes beside it.
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
# CNLE asks a language model behind any OpenAI-compatible endpoint twice: how relevant a mined snippet is to its intent, in five levels at temperature
# 0, and for another wording of each chosen intent. Every answer is kept as it comes, `--budget` caps the tokens, `--concurrency` the questions under way. CSNE
# renames by a masked language model's predictions in context; a variant counts only if its syntax tree, symbol tables and byte code are the
# function's up to the names. The encoder of its neighbours is fine-tuned on code search, on the functions that an offline construction did not target. Without `--model`,
# `--encoder` and `--names` the same stages run offline: a small code model's relevance (below), given second wordings, TF-IDF, and names that are used alike in the pool.
# `--source` takes files of CoNaLa or CodeSearchNet as well. A command that was killed goes on where it stopped; one with other settings is refused
# until the stages that they concern are removed.

# %% tags=["hide-input"]
which = f"those of {built['cnle'].name}" if "cnle" in built else "the embedded pairs by the offline scorer"
caption = f"Pairs by relevance (the paper's Table II): {which}."
measured = Path(results, "benchmarks", "relevance.levels.csv")
benchmark.level_table(benchmark.level_counts(built.get("cnle", measured)), label="tab-levels", caption=caption)

# %% [markdown]
# `make site BUILDS="data/cnle data/csne"` shows what was built there in the tables and samples of this chapter. The embedded pairs were written, not mined, so their table says how strict the offline scorer is, not how good the pairs are.
#
# Without a language model, a pair's relevance is how much likelier the embedded code subject finds the snippet after its own intent than after another,
# per token. Its thresholds come from pairs that imitate mined ones and were written and labelled for this study, then labelled again without a look at the first labels:
#
# ```{csv-table} The offline scorer, the share of words in common (which it replaces) and the second labels against the first ones. Kappa has quadratic weights; each fifth of the pairs is judged by thresholds from the others.
# :name: tab-relevance
# :file: ../benchmarks/relevance.csv
# :header-rows: 1
# ```
#
# The labels are easy to agree on because each pair was written for its level, and hard on words in common: right snippets often share none with their
# intent, and wrong ones do. The model tells unrelated pairs from the others, and hardly the upper levels from each other: it stands in where no
# language model can be asked. On pairs of CoNaLa that people wrote or mended, which are relevant, it puts fewer in the two lowest levels than words in common do;
# on the same snippets after another row's intent it puts more in the two highest:
#
# ```{csv-table} Levels that both scorers give 500 annotated pairs of CoNaLa, and the same snippets after the next row's intent.
# :name: tab-relevance-conala
# :file: ../benchmarks/relevance.source.csv
# :header-rows: 1
# ```
#
# Whether people agree with a scorer:
# `clme data labels data/cnle labels.csv` draws as many pairs as a margin of 5 points at 95% confidence needs, and, once two people have filled
# them in, prints Cohen's kappa between them and with the scorer.
#
# `clme data check FILE` reports on any file in the published layout: counts and lengths, duplicates, neighbours that are targeted or too close,
# code that does not parse, targets that a measure cannot score, missing answers. It fails when it finds an error.
#
# ```{csv-table} Seconds and peak memory at synthetic sizes, one thread, and the paper's sizes by proportion (intents: 20,000 targets against 500,000; functions: 16,000 against 440,000; 16,000 renamings).
# :name: tab-construction-scale
# :file: ../benchmarks/construction.csv
# :header-rows: 1
# ```
#
# The similarity matrix is never held: scikit-learn's index computes exact cosines a part at a time and keeps each target's best. Offline renaming compares the names of
# 20,000 functions of the pool at most. The smallest sizes extrapolate worst,
# because a start's fixed cost is in them. `.venv/bin/python benchmarks/construction.py` measures it again; the time that an encoder takes to read the texts is not in it.
#
# ## What differs from the paper's sets

# %% tags=["hide-input"]
Markdown(f"""| | Paper | Embedded |
| --- | --- | --- |
| CNLE source | mined CoNaLa, relevance scored by an LLM | written for this study |
| CNLE rewording | by an LLM | written with the pair |
| CSNE source | CodeSearchNet | installed Python packages |
| CSNE renaming | ALERT, substitutes from CodeBERT | distributional substitutes, verified |
| neighbours | Arctic-embed, fine-tuned CodeBERT | TF-IDF on split identifiers |
| size | 21,055 and 16k | {len(targets)} and {embedded_csne.TARGETS} |""")

# %% [markdown]
# Packages like these are probably in the training data of most code models, and so is CodeSearchNet. The unedited row of a table shows how often a subject
# writes the target anyway ({numref}`tab-rq1-proficiency`). Thirty cases of each dataset are reserved for
# choosing hyperparameters and are edited in no run of RQ1 or RQ3.
