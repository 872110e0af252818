"""RQ2's tables and figures: what editing costs. All are functions of measurements (efficiency/measure.py)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from .editors import EDITORS
from .efficiency.floor import Ceilings, Phase
from .hyperparameters import load_settings, registered_subjects
from .report import Table, dataset_name, editor_name

# CLMEEval's sizes (paper section III-C; of CSNE the paper says a little over 16,000)
PAPER_CASES = {"cnle": 21_055, "csne": 16_000}
VARIANTS = tuple(name for name in EDITORS if name != "none")
_PLACE = ["subject", "random_weights", "dtype", "machine", "threads"]
_NOT_MEASURED = "not measured"


def circumstances(measured: pd.DataFrame) -> Table:
    """Where the measurements come from."""
    rows = []
    for (subject, random_weights, dtype, machine, threads), mine in measured.groupby(_PLACE, sort=False):
        edits = mine[mine["kind"] == "edit"]
        rows.append(
            {
                "Subject": subject,
                "Weights": "random" if random_weights else "its own",
                "dtype": dtype,
                "Machine": machine if mine["device"].iloc[0] == "cuda" else f"{machine}, {threads} threads",
                "Median tokens (prompt + target)": "<br>".join(
                    f"{dataset_name(name)}: {one['prompt_tokens'].median():.0f} + {one['target_tokens'].median():.0f}"
                    for name, one in edits.groupby("dataset", sort=False)
                ),
                "Library": "<br>".join(f"<code>{one[:10]}</code>" for one in mine["commit"].unique()),
            }
        )
    for name in unmeasured(measured):
        rows.append({"Subject": name, "Weights": _NOT_MEASURED})
    caption = "What was measured, on what. Random weights stand for a subject whose trained weights were not at hand: the sizes are exact."
    return Table(pd.DataFrame(rows).fillna(""), caption, "tab-rq2-circumstances")


def unmeasured(measured: pd.DataFrame) -> list[str]:
    """Registered subjects without any timed edit."""
    there = set(measured[measured["kind"] == "edit"]["subject"])
    return [name for name in registered_subjects() if name not in there]


def cost_table(measured: pd.DataFrame) -> Table:
    """Seconds and peak memory of one edit alone: medians, with quartiles of the time."""
    rows = []
    for keys, mine in _edits(measured).groupby([*_PLACE, "dataset", "editor"], sort=False):
        low, middle, high = mine["seconds"].quantile([0.25, 0.5, 0.75])
        peak, base = mine["peak_mib"].median(), mine["base_mib"].median()
        rows.append(
            {
                "Subject": keys[0],
                "Data": dataset_name(keys[-2]),
                "Editor": editor_name(keys[-1]),
                "n": str(len(mine)),
                "s / edit": f"{middle:.2f}<br><small>{low:.2f} to {high:.2f}</small>",
                "peak MiB": f"{peak:.0f}",
                "of it before the edit": f"{base:.0f}",
                "steps": f"{mine['steps'].median():.0f}",
                "set-up s": _setup(measured, keys),
            }
        )
    caption = (
        "One edit at a time: median seconds with quartiles, and median peak memory with what was in use before the edit. Set-up "
        "(statistics, context templates and encoders, from the cache where they are there) and a warm-up are outside."
    )
    return Table(pd.DataFrame(rows), caption, "tab-rq2-cost")


def cost_summary(measured: pd.DataFrame) -> pd.DataFrame:
    """Median seconds and peak memory (MiB) of one edit alone, a row per subject, data set and editor."""
    groups = _edits(measured).groupby(["subject", "dataset", "editor"], sort=False)
    return groups[["seconds", "peak_mib"]].median().round(3)


def _edits(measured: pd.DataFrame) -> pd.DataFrame:
    order = {name: n for n, name in enumerate(EDITORS)}
    edits = measured[measured["kind"] == "edit"]
    return edits.sort_values(
        ["dataset", "editor"], key=lambda one: one.map(order) if one.name == "editor" else one, kind="stable"
    )


def _setup(measured: pd.DataFrame, keys: tuple) -> str:
    mine = measured[measured["kind"] == "setup"]
    for name, value in zip([*_PLACE, "dataset", "editor"], keys):
        mine = mine[mine[name] == value]
    return f"{mine['seconds'].iloc[0]:.1f}" if len(mine) else ""


def cost_figure(measured: pd.DataFrame, column: str):
    """The paper's efficiency figures: ``seconds`` or ``peak_mib`` of one edit, a panel a data set; a matplotlib figure.

    Of the memory, the paler part was in use before the edit.
    """
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="paper")
    edits = _edits(measured)
    edits = edits.assign(label=edits["subject"] + np.where(edits["random_weights"], " (random weights)", ""))
    datasets, subjects = list(edits["dataset"].unique()), list(edits["label"].unique())
    editors = [name for name in EDITORS if name in set(edits["editor"])]
    colours = dict(zip(subjects, sns.color_palette("colorblind", len(subjects))))
    figure, axes = plt.subplots(1, len(datasets), figsize=(4.6 * len(datasets), 3.2), squeeze=False)
    for axis, dataset in zip(axes[0], datasets):
        for n, subject in enumerate(subjects):
            mine = edits[(edits["dataset"] == dataset) & (edits["label"] == subject)].groupby("editor")
            places = np.arange(len(editors)) + (n - (len(subjects) - 1) / 2) * 0.8 / len(subjects)
            middle = mine[column].median().reindex(editors)
            if column == "seconds":
                spread = [
                    (middle - mine[column].quantile(0.25).reindex(editors)).to_numpy(),
                    (mine[column].quantile(0.75).reindex(editors) - middle).to_numpy(),
                ]
                axis.bar(
                    places,
                    middle,
                    0.8 / len(subjects),
                    yerr=spread,
                    color=colours[subject],
                    label=subject,
                    error_kw={"lw": 0.8},
                )
            else:
                axis.bar(places, middle, 0.8 / len(subjects), color=colours[subject], label=subject)
                base = mine["base_mib"].median().reindex(editors)
                axis.bar(places, base, 0.8 / len(subjects), color="white", alpha=0.6)
        axis.set_xticks(range(len(editors)), [editor_name(one) for one in editors], rotation=40, ha="right")
        axis.set_title(dataset_name(dataset))
        axis.grid(axis="x", visible=False)
        if column == "seconds":
            axis.set_yscale("log")
    axes[0][0].set_ylabel("seconds an edit" if column == "seconds" else "peak memory (MiB)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 1.08), ncol=3)
    figure.tight_layout()
    return figure


def throughput_table(measured: pd.DataFrame) -> Table:
    """Edits a second, alone and with their evaluation, by batch size."""
    batches = measured[measured["kind"] == "throughput"]
    rows = []
    for keys, mine in batches.groupby([*_PLACE, "dataset", "editor"], sort=False):
        row = {"Subject": keys[0], "Data": dataset_name(keys[-2]), "Editor": editor_name(keys[-1])}
        rates = _rates(mine)
        for size, rate in rates.iterrows():
            row[f"edits/s, batch {size}"] = _rate(rate["edits"])
        for size, rate in rates.iterrows():
            row[f"with evaluation, batch {size}"] = _rate(rate["cases"])
        rows.append(row)
    caption = "Edits a second, and edits with their evaluation a second, when cases are edited and scored together."
    return Table(pd.DataFrame(rows).fillna(""), caption, "tab-rq2-throughput")


def _rates(batches: pd.DataFrame) -> pd.DataFrame:
    """Of one editor and data set: edits and evaluated cases a second by batch size (NaN: it did not fit)."""
    mine = batches.set_index(batches["batch"].astype(int)).sort_index()
    whole = mine["edit_seconds"] + mine["evaluate_seconds"]
    return pd.DataFrame({"edits": mine.index / mine["edit_seconds"], "cases": mine.index / whole}, index=mine.index)


def _rate(value: float) -> str:
    return "out of memory" if value != value else f"{value:.3g}"


def floor_table(measured: pd.DataFrame) -> Table:
    """Measured time over the least that counting allows (floor.py), medians over cases edited alone."""
    rows = []
    for keys, mine in measured.groupby(_PLACE, sort=False):
        ceiling = mine[mine["kind"] == "ceiling"]
        if ceiling.empty:
            continue
        device = Ceilings(ceiling["operations_per_second"].iloc[0], ceiling["bytes_per_second"].iloc[0])
        for (dataset, editor), edits in _edits(mine).groupby(["dataset", "editor"], sort=False):
            parts = [[Phase(*one) for one in case] for case in edits["phases"]]
            if not all(parts):
                continue  # nobody has counted this editor's operations
            floors = np.array([device.seconds(case) for case in parts])
            longest = [max(case, key=lambda one: device.seconds([one])) for case in parts]
            bound = [one.operations / device.operations > one.traffic / device.traffic for one in longest]
            rows.append(
                {
                    "Subject": keys[0],
                    "Data": dataset_name(dataset),
                    "Editor": editor_name(editor),
                    "floor s": f"{np.median(floors):.3f}",
                    "measured s": f"{edits['seconds'].median():.3f}",
                    "measured / floor": f"{np.median(edits['seconds'].to_numpy() / floors):.1f}",
                    "longest phase": pd.Series([one.name for one in longest]).mode()[0],
                    "bound by": "arithmetic" if np.mean(bound) > 0.5 else "memory",
                }
            )
    caption = "How far one edit alone is from its floor: the least time that its arithmetic and memory traffic take on this device."
    return Table(pd.DataFrame(rows), caption, "tab-rq2-floor")


def ceiling_table(measured: pd.DataFrame) -> Table:
    """The device's measured rates."""
    rows = [
        {
            "Machine": one["machine"],
            "dtype": one["dtype"],
            "threads": str(one["threads"]),
            "products (10<sup>9</sup> operations/s)": f"{one['operations_per_second'] / 1e9:.0f}",
            "copies (10<sup>9</sup> bytes/s)": f"{one['bytes_per_second'] / 1e9:.1f}",
        }
        for _, one in measured[measured["kind"] == "ceiling"].iterrows()
    ]
    return Table(
        pd.DataFrame(rows),
        "What the device can do: a large matrix product, and a large copy (read and written).",
        "tab-rq2-ceilings",
    )


def projection_table(measured: pd.DataFrame, plain: pd.DataFrame | None = None) -> Table:
    """Hours that the whole study would take: all of CLMEEval's cases by the nine editor variants, edited and evaluated.

    From each variant's measured rate with evaluation, one case at a time and in the best batch; a subject is projected only
    when all variants were measured on both data sets. ``plain`` is the table of ``benchmarks/whole_case.py``: what the fixed plain
    procedure needs for a case on the same machine, of the embedded subject. It is left out for a machine or subject that it lacks.
    """
    rows = []
    batches = measured[measured["kind"] == "throughput"]
    for name in registered_subjects():
        mine = batches[batches["subject"] == name]
        places = [keys for keys, one in mine.groupby(_PLACE, sort=False) if _is_whole(one)]
        if not places:
            rows.append({"Subject": name, "Machine": _NOT_MEASURED})
        for keys in places:
            one = mine[(mine[_PLACE] == pd.Series(keys, index=_PLACE)).all(axis=1)]
            alone, best = _hours(one)
            row = {
                "Subject": name,
                "Machine": keys[3],
                "one case at a time (h)": f"{alone:.0f}",
                "in batches (h)": f"{best:.0f}",
            }
            row["ratio"] = f"{alone / best:.1f}"
            slow = (
                None if plain is None or load_settings(name).subject.source != "embedded" else _plain_hours(plain, keys)
            )
            if slow is not None:
                row |= {"plain procedure (h)": f"{slow:.0f}", "plain / in batches": f"{slow / best:.1f}"}
            rows.append(row)
    total = sum(PAPER_CASES.values())
    caption = (
        f"Projected hours for {total:,} cases (the paper's data sets; CSNE's lengths as mined here) by {len(VARIANTS)} editor variants, "
        "each edited and evaluated; training and set-up apart."
    )
    if plain is not None:
        caption += " The plain procedure's seconds a case are the speed appendix's, whose CSNE prompts have at least 110 tokens."
    return Table(pd.DataFrame(rows).fillna(""), caption, "tab-rq2-projection")


def _is_whole(batches: pd.DataFrame) -> bool:
    fits = batches[batches["edit_seconds"].notna()]
    there = set(zip(fits["dataset"], fits["editor"], fits["batch"].astype(int)))
    return all((dataset, editor, 1) in there for dataset in PAPER_CASES for editor in VARIANTS)


def _hours(batches: pd.DataFrame) -> tuple[float, float]:
    alone = best = 0.0
    for (dataset, _), mine in batches.groupby(["dataset", "editor"]):
        rates = _rates(mine)["cases"].dropna()
        alone += PAPER_CASES[dataset] / rates[1] / 3600
        best += PAPER_CASES[dataset] / rates.max() / 3600
    return alone, best


def _plain_hours(plain: pd.DataFrame, place: tuple) -> float | None:
    mine = plain[(plain["device"] == place[3]) & (plain["threads"] == place[4])]
    # the subject's own values where they were measured: sorted, "subject" comes before "transferred"
    mine = mine.sort_values("values").drop_duplicates(["editor", "data"]).set_index(["data", "editor"])["plain s/case"]
    # an encoder adds nothing to speak of to GRACE's edit
    wanted = [(name, "grace" if "grace" in editor else editor) for name in PAPER_CASES for editor in VARIANTS]
    if not set(wanted) <= set(mine.index):
        return None
    return sum(float(mine[one]) * PAPER_CASES[one[0]] for one in wanted) / 3600


def reading(measured: pd.DataFrame) -> str:
    """Markdown that says what was measured; every figure is computed here."""
    sentences = []
    for (subject, *_), mine in _edits(measured).groupby(_PLACE, sort=False):
        for dataset, edits in mine.groupby("dataset", sort=False):
            middle = edits.groupby("editor")["seconds"].median()
            fast, slow = middle.idxmin(), middle.idxmax()
            sentences.append(
                f"On {subject} and {dataset_name(str(dataset))}, {editor_name(fast)} is the fastest editor ({middle[fast]:.2f} s an "
                f"edit) and {editor_name(slow)} the slowest ({middle[slow]:.1f} s)."
            )
    if missing := unmeasured(measured):
        sentences.append(f"Not measured, for want of a device that holds them: {', '.join(missing)}.")
    return " ".join(sentences)
