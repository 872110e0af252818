"""RQ2's tables and figures: what editing costs. All are functions of measurements (measure.py)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ...editors.operations import Phase
from ...editors.registry import list_editors
from ...subjects.settings import load_settings, registered_subjects
from ..paper import STUDY_EDITORS
from ..tables import Table, dataset_name, editor_name, in_order
from .floor import Ceilings

# CLMEEval's sizes (paper section III-C; of CSNE the paper says a little over 16,000)
PAPER_CASES = {"cnle": 21_055, "csne": 16_000}
_PLACE = ["subject", "random_weights", "dtype", "machine", "threads"]
_NOT_MEASURED, _TOO_LARGE = "not measured", "out of memory"


def circumstances(measured: pd.DataFrame) -> Table:
    """Where the measurements come from."""
    rows = []
    in_order = measured.sort_values("random_weights", kind="stable")
    for (subject, random_weights, dtype, machine, threads), measured_there in in_order.groupby(_PLACE, sort=False):
        edits = measured_there[measured_there["kind"] == "edit"]
        rows.append(
            {
                "Subject": subject,
                "Weights": "random" if random_weights else "its own",
                "dtype": dtype,
                "Machine": machine if measured_there["device"].iloc[0] == "cuda" else f"{machine}, {threads} threads",
                "Median tokens (prompt + target)": "<br>".join(
                    f"{dataset_name(name)}: {part['prompt_tokens'].median():.0f} + {part['target_tokens'].median():.0f}"
                    for name, part in edits.groupby("dataset", sort=False)
                ),
                "Library": "<br>".join(f"<code>{commit[:10]}</code>" for commit in measured_there["commit"].unique()),
            }
        )
    for name in unmeasured(measured):
        rows.append({"Subject": name, "Weights": _NOT_MEASURED})
    caption = "What was measured, on what. Random weights stand for a subject whose trained weights were not at hand: the sizes are exact."
    return Table(pd.DataFrame(rows).fillna(""), caption, "tab-rq2-circumstances")


def unmeasured(measured: pd.DataFrame) -> list[str]:
    """Registered subjects without any timed edit."""
    timed = set(measured[measured["kind"] == "edit"]["subject"])
    return [name for name in registered_subjects() if name not in timed]


def cost_table(measured: pd.DataFrame) -> Table:
    """Seconds and peak memory of one edit alone: medians, with quartiles of the time where there are several edits."""
    edits, tried = _rows(measured, "edit"), _rows(measured, "edit", "setup")
    too_large = _too_large(tried)
    rows, names = [], list(measured["dataset"].dropna().unique())
    for (label, editor), whole in tried.groupby(["label", "editor"], sort=False):
        timed = edits[(edits["label"] == label) & (edits["editor"] == editor)]
        setup = whole[whole["kind"] == "setup"]
        row = {"Subject": label, "Editor": editor_name(editor), "n": _counts(timed["dataset"].value_counts())}
        for name in names:
            seconds = timed[timed["dataset"] == name]["seconds"]
            row[f"{dataset_name(name)} s / edit"] = (
                _TOO_LARGE if (label, name, editor) in too_large else _spread(seconds)
            )
        for name in names:
            row[f"{dataset_name(name)} peak MiB"] = _whole(timed[timed["dataset"] == name]["peak_mib"].median())
        row["before MiB"] = _whole(timed["base_mib"].median())
        row["steps"] = _whole(timed["steps"].median())
        row["set-up s"] = f"{setup['seconds'].max():.1f}" if setup["seconds"].notna().any() else ""
        rows.append(row)
    caption = (
        "One edit at a time: median seconds with quartiles, and median peak memory with what was in use before the edit. Set-up "
        "(statistics, context templates and encoders, from the cache where they are there) and a warm-up are outside; n is per data set."
    )
    return Table(pd.DataFrame(rows), caption, "tab-rq2-cost")


def _too_large(tried: pd.DataFrame) -> set[tuple[str, str, str]]:
    """(label, data set, editor) of what did not fit into the device's memory."""
    failed = tried[tried["error"].notna()] if "error" in tried else tried.iloc[:0]
    return set(zip(failed["label"], failed["dataset"], failed["editor"]))


def _counts(counts: pd.Series) -> str:
    return " and ".join(str(count) for count in sorted(set(counts))) or "0"


def _spread(seconds: pd.Series) -> str:
    if seconds.empty:
        return ""
    low, middle, high = seconds.quantile([0.25, 0.5, 0.75])
    return f"{middle:.2f}" + (f"<br><small>{low:.2f} to {high:.2f}</small>" if len(seconds) > 1 else "")


def _whole(value: float) -> str:
    return "" if value != value else f"{value:.0f}"


def cost_summary(measured: pd.DataFrame) -> pd.DataFrame:
    """Median seconds and peak memory (MiB) of one edit alone, a row per subject, data set and editor."""
    groups = _rows(measured, "edit").groupby(["subject", "dataset", "editor"], sort=False)
    return groups[["seconds", "peak_mib"]].median().round(3)


def _labels(measured: pd.DataFrame) -> pd.Series:
    """A row's subject, with what of weights, dtype, machine and threads tells it apart from what one may take it for."""
    machines = measured["machine"].nunique() > 1
    threads = measured[measured["device"] == "cpu"]["threads"].nunique() > 1
    kinds = measured["dtype"].nunique() > 1 or bool(measured["random_weights"].any())

    def label(row: pd.Series) -> str:
        said = {"random weights": row["random_weights"], row["dtype"]: kinds, row["machine"]: machines}
        said[f"{row['threads']} threads"] = threads and row["device"] == "cpu"
        parts = [what for what, needed in said.items() if needed]
        return row["subject"] + (f" ({', '.join(parts)})" if parts else "")

    return pd.Series([label(row) for _, row in measured.iterrows()], index=measured.index)


def _rows(measured: pd.DataFrame, *kinds: str) -> pd.DataFrame:
    """Rows of some kinds with a column ``label``, those of random weights last; data sets and editors in the study's order."""
    labelled = measured.assign(label=_labels(measured))
    labels = list(labelled.sort_values("random_weights", kind="stable")["label"].unique())
    ranks = {"label": labels, "dataset": list(PAPER_CASES), "editor": list_editors()}
    return labelled[labelled["kind"].isin(kinds)].sort_values(
        list(ranks), key=lambda names: names.map({name: n for n, name in enumerate(ranks[names.name])}), kind="stable"
    )


def cost_figure(measured: pd.DataFrame, column: str):
    """The paper's efficiency figures: ``seconds`` or ``peak_mib`` of one edit, a panel a data set; a matplotlib figure.

    Of the memory, the paler part was in use before the edit.
    """
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="paper")
    edits = _rows(measured, "edit")
    datasets, subjects = list(edits["dataset"].unique()), list(edits["label"].unique())
    editors = in_order(edits["editor"].unique())
    colours = sns.color_palette("colorblind", len(subjects))
    width = 0.8 / len(subjects)
    figure, axes = plt.subplots(1, len(datasets), figsize=(4.6 * len(datasets), 3.2), sharey=True, squeeze=False)
    for axis, dataset in zip(axes[0], datasets):
        for n, (subject, colour) in enumerate(zip(subjects, colours)):
            groups = edits[(edits["dataset"] == dataset) & (edits["label"] == subject)].groupby("editor")
            places = np.arange(len(editors)) + (n - (len(subjects) - 1) / 2) * width
            middle = groups[column].median().reindex(editors)
            axis.bar(places, middle, width, color=colour, label=subject)
            if column == "seconds":
                low, high = (groups[column].quantile(share).reindex(editors) for share in (0.25, 0.75))
                spread = [(middle - low).to_numpy(), (high - middle).to_numpy()]
                axis.errorbar(places, middle, yerr=spread, fmt="none", ecolor="black", elinewidth=0.8)
            else:
                axis.bar(places, groups["base_mib"].median().reindex(editors), width, color="white", alpha=0.6)
        axis.set_xticks(range(len(editors)), map(editor_name, editors), rotation=40, ha="right")
        axis.set_title(dataset_name(dataset))
        axis.grid(axis="x", visible=False)
        if column == "seconds":
            axis.set_yscale("log")
    axes[0][0].set_ylabel("seconds an edit" if column == "seconds" else "peak memory (MiB)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", bbox_to_anchor=(0.5, 0.98), ncol=2)
    figure.tight_layout()
    return figure


def throughput_table(measured: pd.DataFrame) -> Table:
    """Edits a second, alone and with their evaluation, by batch size."""
    heads = {"edits": "edits/s, batch", "cases": "with evaluation, batch"}
    rows = []
    for (label, dataset, editor), batches in _rows(measured, "throughput").groupby(
        ["label", "dataset", "editor"], sort=False
    ):
        row = {"Subject": label, "Data": dataset_name(dataset), "Editor": editor_name(editor)}
        for kind, rates in _rates(batches).items():
            row |= {f"{heads[kind]} {size}": _rate(rate) for size, rate in rates.items()}
        rows.append(row)
    caption = "Edits a second, and edits with their evaluation a second, when cases are edited and scored together."
    return Table(pd.DataFrame(rows).fillna(""), caption, "tab-rq2-throughput")


def _rates(batches: pd.DataFrame) -> pd.DataFrame:
    """Of one editor and data set: edits and evaluated cases a second by batch size (NaN: it did not fit)."""
    by_size = batches.set_index(batches["batch"].astype(int)).sort_index()
    whole = by_size["edit_seconds"] + by_size["evaluate_seconds"]
    return pd.DataFrame(
        {"edits": by_size.index / by_size["edit_seconds"], "cases": by_size.index / whole}, index=by_size.index
    )


def _rate(value: float) -> str:
    return _TOO_LARGE if value != value else f"{value:.3g}"


def floor_table(measured: pd.DataFrame) -> Table:
    """Measured time over the least that counting allows (floor.py), medians over cases edited alone."""
    edits, names = _rows(measured, "edit"), list(measured["dataset"].dropna().unique())
    rates = _rows(measured, "ceiling").drop_duplicates("label").set_index("label")
    rows = []
    for (label, editor), timed in edits.groupby(["label", "editor"], sort=False):
        if label not in rates.index or not all(timed["phases"]):
            continue  # nobody has counted this editor's operations
        device = Ceilings(rates.loc[label, "operations_per_second"], rates.loc[label, "bytes_per_second"])
        phases = [[Phase(*phase) for phase in case] for case in timed["phases"]]
        floors = pd.Series([device.seconds(case) for case in phases], index=timed.index)
        shown = {"floor s": (floors, ".3f"), "measured / floor": (timed["seconds"] / floors, ".1f")}
        row = {"Subject": label, "Editor": editor_name(editor)}
        for head, (values, digits) in shown.items():
            for name in names:
                middle = values[timed["dataset"] == name].median()
                row[f"{dataset_name(name)} {head}"] = "" if np.isnan(middle) else format(middle, digits)
        longest = [max(case, key=lambda phase: device.seconds([phase])) for case in phases]
        bound = [phase.operations / device.operations > phase.traffic / device.traffic for phase in longest]
        row["longest phase"] = pd.Series([phase.name for phase in longest]).mode()[0]
        row["bound by"] = "arithmetic" if np.mean(bound) > 0.5 else "memory"
        rows.append(row)
    caption = "How far one edit alone is from its floor: the least time that its arithmetic and memory traffic take on this device."
    return Table(pd.DataFrame(rows), caption, "tab-rq2-floor")


def ceiling_table(measured: pd.DataFrame) -> Table:
    """The device's measured rates."""
    rows = [
        {
            "Machine": ceiling["machine"],
            "dtype": ceiling["dtype"],
            "threads": str(ceiling["threads"]),
            "products (10<sup>9</sup> operations/s)": f"{ceiling['operations_per_second'] / 1e9:.0f}",
            "copies (10<sup>9</sup> bytes/s)": f"{ceiling['bytes_per_second'] / 1e9:.1f}",
        }
        for _, ceiling in measured[measured["kind"] == "ceiling"].iterrows()
    ]
    return Table(
        pd.DataFrame(rows),
        "What the device can do: a large matrix product, and a large copy (read and written).",
        "tab-rq2-ceilings",
    )


def projection_table(measured: pd.DataFrame, plain: pd.DataFrame | None = None) -> Table:
    """Hours that the whole study would take: all of CLMEEval's cases by the study's editors, edited and evaluated.

    From each editor's measured rate with evaluation, one case at a time and in the best batch; a subject is projected only
    when all of them were measured on both data sets. ``plain`` is the table of ``benchmarks/whole_case.py``: what the fixed plain
    procedure needs for a case on the same machine, of the embedded subject. It is left out for a machine or subject that it lacks.
    """
    rows = []
    batches = measured[(measured["kind"] == "throughput") & measured["editor"].isin(STUDY_EDITORS)]
    for name in registered_subjects():
        groups = batches[batches["subject"] == name].groupby(_PLACE, sort=False)
        whole = [(place, part) for place, part in groups if _is_whole(part)]
        if not whole:
            rows.append({"Subject": name, "Machine": _NOT_MEASURED})
        for place, part in whole:
            alone, best = _hours(part)
            row = {
                "Subject": name,
                "Machine": place[3],
                "one case at a time (h)": f"{alone:.0f}",
                "in batches (h)": f"{best:.0f}",
                "ratio": f"{alone / best:.1f}",
            }
            if plain is not None and load_settings(name).subject.source == "embedded":
                if (slow := _plain_hours(plain, place)) is not None:
                    row |= {"plain procedure (h)": f"{slow:.0f}", "plain / in batches": f"{slow / best:.1f}"}
            rows.append(row)
    total = sum(PAPER_CASES.values())
    caption = (
        f"Projected hours for {total:,} cases (the paper's data sets; CSNE's lengths as mined here) by {len(STUDY_EDITORS)} editor variants, "
        "each edited and evaluated; training and set-up apart."
    )
    if plain is not None:
        caption += " The plain procedure's seconds a case are the speed appendix's, whose CSNE prompts have at least 110 tokens."
    return Table(pd.DataFrame(rows).fillna(""), caption, "tab-rq2-projection")


def _is_whole(batches: pd.DataFrame) -> bool:
    fits = batches[batches["edit_seconds"].notna()]
    measured = set(zip(fits["dataset"], fits["editor"], fits["batch"].astype(int)))
    return all((dataset, editor, 1) in measured for dataset in PAPER_CASES for editor in STUDY_EDITORS)


def _hours(batches: pd.DataFrame) -> tuple[float, float]:
    alone = best = 0.0
    for (dataset, _), measured in batches.groupby(["dataset", "editor"]):
        rates = _rates(measured)["cases"].dropna()
        alone += PAPER_CASES[dataset] / rates[1] / 3600
        best += PAPER_CASES[dataset] / rates.max() / 3600
    return alone, best


def _plain_hours(plain: pd.DataFrame, place: tuple) -> float | None:
    seconds = plain[(plain["device"] == place[3]) & (plain["threads"] == place[4])]
    # the subject's own values where they were measured: sorted, "subject" comes before "transferred"
    seconds = (
        seconds.sort_values("values").drop_duplicates(["editor", "data"]).set_index(["data", "editor"])["plain s/case"]
    )
    # an encoder adds nothing to speak of to GRACE's edit
    pairs = [(name, "grace" if "grace" in editor else editor) for name in PAPER_CASES for editor in STUDY_EDITORS]
    if not set(pairs) <= set(seconds.index):
        return None
    return sum(float(seconds[pair]) * PAPER_CASES[pair[0]] for pair in pairs) / 3600


def reading(measured: pd.DataFrame) -> str:
    """Markdown that says what was measured, and which of the paper's orderings it has; every figure is computed here."""
    edits = _rows(measured, "edit")
    middle = edits.groupby(["label", "dataset", "editor"], sort=False)["seconds"].median().unstack("editor")
    sentences = []
    for label, mine in middle.groupby(level="label", sort=False):
        costs = [
            f"from {row.min():.2g} s ({editor_name(row.idxmin())}) to {row.max():.3g} s ({editor_name(row.idxmax())}) on {dataset_name(str(name))}"
            for (_, name), row in mine.iterrows()
        ]
        sentences.append(f"On {label}, an edit takes {' and '.join(costs)}.")
    sentences += _orderings(middle, edits)
    half = edits[edits["dtype"].isin(["bfloat16", "float16"]) & edits["peak_mib"].notna()]
    if len(half):
        most = half.loc[half["peak_mib"].idxmax()]
        sentences.append(
            f"The largest peak in 16 bits is {most['peak_mib'] / 1024:.1f} GiB ({editor_name(most['editor'])} on {most['label']})."
        )
    if failed := _too_large(_rows(measured, "setup")):
        whole = {label: sorted({one for where, _, one in failed if where == label}) for label, _, _ in sorted(failed)}
        lists = [f"{' and '.join(map(editor_name, names))} on {label}" for label, names in whole.items()]
        sentences.append(f"Did not fit into the device's memory: {'; '.join(lists)}.")
    if not (measured["device"] == "cuda").any():
        sentences.append("Nothing of this was measured on a GPU.")
    if missing := unmeasured(measured):
        sentences.append(f"Not measured, for want of a device that holds them: {', '.join(missing)}.")
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _orderings(middle: pd.DataFrame, edits: pd.DataFrame) -> list[str]:
    """What the paper found of its subjects on its GPU, counted in these measurements.

    Args:
        middle: median seconds of an edit, a row for each subject's label and data set, a column an editor.
    """
    sentences = []
    if {"malmen", "memit", "pmet"} <= set(middle.columns):
        whole = middle.dropna(subset=["malmen", "memit", "pmet"])
        first = (whole.idxmin(axis=1) == "malmen").sum()
        last = whole.idxmax(axis=1).isin(["memit", "pmet"]).sum()
        sentences.append(
            f"The paper finds MALMEN fastest and MEMIT and PMET slowest: of the {len(whole)} pairs of subject and data set in which all "
            f"three were measured, MALMEN is the fastest in {first} and one of the other two the slowest in {last}."
        )
    if {"cnle", "csne"} <= set(middle.index.get_level_values("dataset")):
        both = middle.stack().unstack("dataset").dropna()
        longer = (both["csne"] > both["cnle"]).sum()
        sentences.append(
            f"It finds CSNE dearer than CNLE: so it is in {longer} of {len(both)} pairs of subject and editor."
        )
    random = edits[edits["random_weights"]]
    # by the editors that all of them have: one may not fit
    subjects = random.groupby("editor")["subject"].nunique()
    common = subjects.index[subjects == random["subject"].nunique()]
    shapes = random[random["editor"].isin(common)].groupby("subject", sort=False)
    if len(shapes) > 1:
        slow, large = shapes["seconds"].median().idxmax(), shapes["peak_mib"].median().idxmax()
        both = (
            f"{slow} has the largest median time and memory"
            if slow == large
            else (f"{slow} has the largest median time, {large} the largest median memory")
        )
        sentences.append(
            f"It finds CodeQwen1.5-7B slowest and largest: of its subjects' shapes, by the editors measured on all, {both}."
        )
    return sentences
