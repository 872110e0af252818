"""RQ2's tables and figures: what editing costs. All are functions of measurements (measure.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ...datasets.paper import CNLE, CSNE, PAPER_DATASETS
from ...editors.operations import Phase
from ...editors.registry import list_editors
from ...subjects.settings import list_subjects, load_settings
from ..paper import PAPER_VARIANTS
from ..tables import Table, dataset_name, editor_name, in_order
from .floor import Ceilings

# CLMEEval's sizes (paper section III-C; of CSNE the paper says a little over 16,000)
PAPER_CASES = {dataset.name: dataset.paper_cases or 0 for dataset in PAPER_DATASETS}
_PLACE = ["subject", "random_weights", "dtype", "machine", "threads"]
_NOT_MEASURED, _TOO_LARGE = "not measured", "out of memory"


def circumstances(measured: pd.DataFrame, label: str, caption: str = "What was measured, on what.") -> Table:
    """Where the measurements come from."""
    rows = []
    by_weights = measured.sort_values("random_weights", kind="stable")
    for (subject, random_weights, dtype, machine, threads), measured_there in by_weights.groupby(_PLACE, sort=False):
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
    return Table(pd.DataFrame(rows).fillna(""), caption, label)


def unmeasured(measured: pd.DataFrame) -> list[str]:
    """Registered subjects without any timed edit."""
    timed = set(measured[measured["kind"] == "edit"]["subject"])
    return [name for name in list_subjects() if name not in timed]


def cost_table(measured: pd.DataFrame, label: str, caption: str = "One edit at a time.") -> Table:
    """Seconds and peak memory of one edit alone: medians, with quartiles of the time where there are several edits."""
    edits, tried = _rows(measured, "edit"), _rows(measured, "edit", "setup")
    too_large = _too_large(tried)
    rows = []
    for (of_subject, editor), whole in tried.groupby(["label", "editor"], sort=False):
        timed = edits[(edits["label"] == of_subject) & (edits["editor"] == editor)]
        setup = whole[whole["kind"] == "setup"]
        row = {"Subject": of_subject, "Editor": editor_name(editor), "n": _counts(timed["dataset"].value_counts())}
        names = list(measured["dataset"].dropna().unique())
        for name in names:
            seconds = _spread(timed[timed["dataset"] == name]["seconds"])
            full = (of_subject, name, editor) in too_large
            row[f"{dataset_name(name)} s / edit"] = _TOO_LARGE if full else seconds
        for name in names:
            row[f"{dataset_name(name)} peak MiB"] = _whole(timed[timed["dataset"] == name]["peak_mib"].median())
        row["before MiB"] = _whole(timed["base_mib"].median())
        row["steps"] = _whole(timed["steps"].median())
        row["set-up s"] = f"{setup['seconds'].max():.1f}" if setup["seconds"].notna().any() else ""
        rows.append(row)
    return Table(pd.DataFrame(rows), caption, label)


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
                axis.errorbar(places, middle, yerr=spread, fmt="none", ecolor="k", elinewidth=0.8)
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


def throughput_table(measured: pd.DataFrame, label: str, caption: str = "Edits per second.") -> Table:
    """Edits per second, alone and with their evaluation, by batch size."""
    batches = _rows(measured, "throughput")
    rows = []
    for (of_subject, dataset, editor), of_editor in batches.groupby(["label", "dataset", "editor"], sort=False):
        row = {"Subject": of_subject, "Data": dataset_name(dataset), "Editor": editor_name(editor)}
        rates = _rates(of_editor)
        for size, rate in rates.iterrows():
            row[f"edits/s, batch {size}"] = _rate(rate["edits"])
        for size, rate in rates.iterrows():
            row[f"with evaluation, batch {size}"] = _rate(rate["cases"])
        rows.append(row)
    return Table(pd.DataFrame(rows).fillna(""), caption, label)


def _rates(batches: pd.DataFrame) -> pd.DataFrame:
    """Of one editor and data set: edits and evaluated cases a second by batch size (NaN: it did not fit)."""
    by_size = batches.set_index(batches["batch"].astype(int)).sort_index()
    whole = by_size["edit_seconds"] + by_size["evaluate_seconds"]
    return pd.DataFrame(
        {"edits": by_size.index / by_size["edit_seconds"], "cases": by_size.index / whole}, index=by_size.index
    )


def _rate(value: float) -> str:
    return _TOO_LARGE if value != value else f"{value:.3g}"


def floor_table(measured: pd.DataFrame, label: str, caption: str = "One edit and its floor.") -> Table:
    """Measured time over the least that counting allows (floor.py), medians over cases edited alone."""
    edits, names = _rows(measured, "edit"), list(measured["dataset"].dropna().unique())
    rates = _rows(measured, "ceiling").drop_duplicates("label").set_index("label")
    rows = []
    for (of_subject, editor), whole in edits.groupby(["label", "editor"], sort=False):
        if of_subject not in rates.index or not all(whole["phases"]):
            continue  # nobody has counted this editor's operations
        device = Ceilings(*rates.loc[of_subject, ["operations_per_second", "bytes_per_second"]])
        row = {"Subject": of_subject, "Editor": editor_name(editor)}
        parts = [[Phase(*phase) for phase in case] for case in whole["phases"]]
        floors = pd.Series([device.seconds(case) for case in parts], index=whole.index)
        for name in names:
            of_dataset = whole["dataset"] == name
            row[f"{dataset_name(name)} floor s"] = f"{floors[of_dataset].median():.3f}" if of_dataset.any() else ""
        for name in names:
            of_dataset = whole["dataset"] == name
            ratio = (whole["seconds"] / floors)[of_dataset].median()
            row[f"{dataset_name(name)} measured / floor"] = f"{ratio:.1f}" if of_dataset.any() else ""
        longest = [max(case, key=lambda phase: device.seconds([phase])) for case in parts]
        bound = [phase.operations / device.operations > phase.traffic / device.traffic for phase in longest]
        row["longest phase"] = pd.Series([phase.name for phase in longest]).mode()[0]
        row["bound by"] = "arithmetic" if np.mean(bound) > 0.5 else "memory"
        rows.append(row)
    return Table(pd.DataFrame(rows), caption, label)


def ceiling_table(measured: pd.DataFrame, label: str, caption: str = "What the device can do.") -> Table:
    """The device's measured rates: of a large matrix product, and of a large copy (read and written)."""
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
    return Table(pd.DataFrame(rows), caption, label)


def projection_table(
    measured: pd.DataFrame,
    plain: pd.DataFrame | None = None,
    *,
    label: str,
    caption: str = "Projected hours for the whole study.",
) -> Table:
    """Hours that the whole study would take: all of CLMEEval's cases by the nine editor variants, edited and evaluated.

    From each editor's measured rate with evaluation, one case at a time and in the best batch; a subject is projected only
    when all of them were measured on both data sets. ``plain`` is the table of ``benchmarks/whole_case.py``: what the fixed plain
    procedure needs for a case on the same machine, of the embedded subject. It is left out for a machine or subject that it lacks.
    """
    rows = []
    batches = measured[(measured["kind"] == "throughput") & measured["editor"].isin(PAPER_VARIANTS)]
    for name in list_subjects():
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
            embedded = load_settings(name).subject.source == "embedded"
            if plain is not None and embedded and (slow := _plain_hours(plain, place)) is not None:
                row |= {"plain procedure (h)": f"{slow:.0f}", "plain / in batches": f"{slow / best:.1f}"}
            rows.append(row)
    return Table(pd.DataFrame(rows).fillna(""), caption, label)


def _is_whole(batches: pd.DataFrame) -> bool:
    fits = batches[batches["edit_seconds"].notna()]
    measured = set(zip(fits["dataset"], fits["editor"], fits["batch"].astype(int)))
    return all((dataset, editor, 1) in measured for dataset in PAPER_CASES for editor in PAPER_VARIANTS)


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
    pairs = [(name, "grace" if "grace" in editor else editor) for name in PAPER_CASES for editor in PAPER_VARIANTS]
    if not set(pairs) <= set(seconds.index):
        return None
    return sum(float(seconds[pair]) * PAPER_CASES[pair[0]] for pair in pairs) / 3600


def findings(measured: pd.DataFrame) -> dict[str, Any]:
    """What was measured, and which of the paper's orderings the measurements have. Editors and data sets go by their titles.

    Returns:
        ``costs``: median seconds of an edit, a row for each subject (its label) and data set, with the ``fastest`` and the
        ``slowest`` editor and its ``least`` and ``most`` seconds. ``malmen``: in how many of the ``pairs`` of subject and data
        set that have all three MALMEN is the ``fastest``, and MEMIT or PMET the ``slowest``. ``dearer``: in how many ``pairs``
        of subject and editor CSNE takes ``longer``. ``shapes``: of several subjects with random weights, by the editors
        measured on all of them, the one with the largest median ``seconds`` and ``peak_mib``. ``half``: ``gib``, ``editor`` and
        ``subject`` of the largest peak in 16 bits. These four are None where there is nothing to count. ``too_large``: by
        subject, the editors that did not fit into memory. ``on_gpu``: whether anything was measured on one.
        ``unmeasured``: registered subjects without measurements.
    """
    edits = _rows(measured, "edit")
    medians = edits.groupby(["label", "dataset", "editor"], sort=False)["seconds"].median().unstack("editor")
    costs = {"least": medians.min(axis=1), "most": medians.max(axis=1)}
    costs |= {"fastest": medians.idxmin(axis=1).map(editor_name), "slowest": medians.idxmax(axis=1).map(editor_name)}
    failed = sorted(_too_large(_rows(measured, "setup")))
    too_large = {label: sorted({name for subject, _, name in failed if subject == label}) for label, _, _ in failed}
    half = edits[edits["dtype"].isin(["bfloat16", "float16"]) & edits["peak_mib"].notna()]
    largest = half.loc[half["peak_mib"].idxmax()] if len(half) else None
    return {
        "costs": pd.DataFrame(costs).rename(index=dataset_name, level="dataset"),
        **_orderings(medians, edits[edits["random_weights"]]),
        "half": None
        if largest is None
        else {"gib": largest["peak_mib"] / 1024, "editor": editor_name(largest["editor"]), "subject": largest["label"]},
        "too_large": {label: [editor_name(name) for name in names] for label, names in too_large.items()},
        "on_gpu": bool((measured["device"] == "cuda").any()),
        "unmeasured": unmeasured(measured),
    }


def _orderings(medians: pd.DataFrame, random: pd.DataFrame) -> dict[str, dict[str, Any] | None]:
    """What the paper says of its subjects on its GPU, counted in these measurements (see :func:`findings`)."""
    counted: dict[str, dict[str, Any] | None] = dict.fromkeys(("malmen", "dearer", "shapes"))
    if {"malmen", "memit", "pmet"} <= set(medians.columns):
        whole = medians.dropna(subset=["malmen", "memit", "pmet"])
        first, last = whole.idxmin(axis=1) == "malmen", whole.idxmax(axis=1).isin(["memit", "pmet"])
        counted["malmen"] = {"pairs": len(whole), "fastest": first.sum(), "slowest": last.sum()}
    if set(PAPER_CASES) <= set(medians.index.get_level_values("dataset")):
        both = medians.stack().unstack("dataset").dropna()
        counted["dearer"] = {"pairs": len(both), "longer": (both[CSNE.name] > both[CNLE.name]).sum()}
    # by the editors that all of them have: one may not fit
    subjects = random.groupby("editor")["subject"].nunique()
    common = subjects.index[subjects == random["subject"].nunique()]
    shapes = random[random["editor"].isin(common)].groupby("subject", sort=False)[["seconds", "peak_mib"]].median()
    if len(shapes) > 1:
        counted["shapes"] = shapes.idxmax().to_dict()
    return counted
