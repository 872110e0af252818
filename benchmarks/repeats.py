"""How much of a published run comes out the same with today's library: runs of some of its cases, compared text by text.

Runs are made by ``clme run --within PUBLISHED --name NAME --out RUN``, with any editors and number of cases. Published records that were made
by the library of a run are left out.

usage: python benchmarks/repeats.py PUBLISHED RUN [RUN ...] [--out FILE.csv]
"""

import argparse
from pathlib import Path

import pandas as pd

from clme_lib.datasets.base import dataset_title
from clme_lib.metrics.base import FREE_TEXTS, MEASURES
from clme_lib.study.run_folder import load_run
from clme_lib.study.spot_check import compare
from clme_lib.study.tables import editor_name, in_order

MATCHES = ("effectiveness_em", "generalization_em", "specificity_em")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("published", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    repeated, published = pd.concat(map(load_run, options.runs)), load_run(options.published)
    published = published[~published["library"].isin(repeated["library"])]
    compared = compare(repeated, published)
    pairs = repeated.merge(published, on=["dataset", "editor", "case_id"], suffixes=("", "_published"))
    scored_alike = pd.DataFrame({name: pairs[name] == pairs[f"{name}_published"] for name in MATCHES}).all(axis=1)
    alike = scored_alike.groupby([pairs["dataset"], pairs["editor"]]).sum()
    rows = []
    ranks = {name: rank for rank, name in enumerate(in_order(compared.table["editor"]))}
    placed = compared.table.assign(rank=compared.table["editor"].map(ranks)).sort_values(["dataset", "rank"])
    for row in placed.to_dict("records"):
        key = row["dataset"], row["editor"]
        changed = {
            text.case_id
            for text in compared.differences
            if (text.dataset, text.editor) == key and text.measure in (*MEASURES, *FREE_TEXTS)
        }
        rows.append(
            {
                "data": dataset_title(row["dataset"]),
                "editor": editor_name(row["editor"]),
                "cases": row["cases"],
                "cases with the same greedy texts": row["cases"] - len(changed),
                "cases with the same exact matches": alike[key],
                "greedy texts that are the same": f"{row['greedy_same']} of {row['greedy']}",
                "sampled texts that are the same": f"{row['sampled_same']} of {row['sampled']}",
            }
        )
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
