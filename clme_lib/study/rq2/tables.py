"""RQ2's tables and figures, on the cost of editing. All are computed from measurements (measure.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from ...datasets.base import dataset_title
from ...datasets.paper import CNLE, CSNE, PAPER_DATASETS
from ...editors.operations import Phase
from ...editors.registry import list_editors
from ...subjects.settings import list_subjects, load_settings
from ...support.display import Markup, inline, inline_code
from ..figures import legend, panels, plain, positions
from ..paper import PAPER_VARIANTS
from ..tables import editor_name, in_order, table
from .floor import Ceilings

# CLMEEval's sizes (paper section III-C, which gives a little over 16,000 for CSNE)
PAPER_CASES = {dataset.name: dataset.paper_cases or 0 for dataset in PAPER_DATASETS}
_PAIRS = [(dataset, editor) for dataset in PAPER_CASES for editor in PAPER_VARIANTS]
_PLACE = ["subject", "random_weights", "dtype", "machine", "threads"]
_NOT_MEASURED, _TOO_LARGE = "not measured", "out of memory"


@table
def circumstances(measured: pd.DataFrame) -> Iterator[dict[str, str]]:
    """The circumstances of the measurements: weights, dtype, machine, tokens and version of the library."""
    by_weights = measured.sort_values("random_weights", kind="stable")
    for (subject, random_weights, dtype, machine, threads), rows in by_weights.groupby(_PLACE, sort=False):
        edits = rows[rows["kind"] == "edit"].groupby("dataset", sort=False)[["prompt_tokens", "target_tokens"]]
        tokens = [
            inline(f"{dataset_title(name)}: {prompt:.0f} + {target:.0f}")
            for name, prompt, target in edits.median().itertuples()
        ]
        yield {
            "Subject": subject,
            "Weights": "random" if random_weights else "trained",
            "dtype": dtype,
            "Machine": machine if rows["device"].iloc[0] == "cuda" else f"{machine}, {threads} threads",
            "Median tokens (prompt + target)": Markup("<br>".join(tokens)),
            "Library": Markup("<br>".join(inline_code(commit[:10]) for commit in rows["commit"].unique())),
        }
    for name in unmeasured(measured):
        yield {"Subject": name, "Weights": _NOT_MEASURED}


def unmeasured(measured: pd.DataFrame) -> list[str]:
    """Registered subjects without any timed edit, except subjects with an adapter, whose edits cost the same as their base model's."""
    timed = set(measured[measured["kind"] == "edit"]["subject"])
    return [name for name in list_subjects() if name not in timed and load_settings(name).subject.adapter is None]


@table
def cost_table(measured: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Seconds and peak memory of one edit alone: medians, with quartiles of the time if there are several edits; and, for editors that
    put text before prompts, how many tokens this adds."""
    shows_added = "added_tokens" in measured and (measured["added_tokens"] > 0).any()
    names = list(measured["dataset"].dropna().unique())
    for (subject, editor), rows in _rows(measured, "edit", "setup").groupby(["label", "editor"], sort=False):
        edits = rows[rows["kind"] == "edit"]
        counts = sorted(set(edits["dataset"].value_counts()))
        row = {"Subject": subject, "Editor": editor_name(editor), "n": " and ".join(map(str, counts)) or "0"}
        too_large = set(rows[rows["error"].notna()]["dataset"])
        for name in names:
            seconds = _spread(edits[edits["dataset"] == name]["seconds"])
            row[f"{dataset_title(name)} s / edit"] = _TOO_LARGE if name in too_large else seconds
        for name in names:
            row[f"{dataset_title(name)} peak MiB"] = _number(
                edits[edits["dataset"] == name]["peak_mib"].median(), ".0f"
            )
        for name in names if shows_added else ():
            added = edits[edits["dataset"] == name]["added_tokens"].median()
            row[f"{dataset_title(name)} prompt tokens added"] = _number(added, ".0f")
        row["before MiB"] = _number(edits["base_mib"].median(), ".0f")
        row["steps"] = _number(edits["steps"].median(), ".0f")
        row["set-up s"] = _number(rows[rows["kind"] == "setup"]["seconds"].max(), ".1f")
        yield row


def _spread(seconds: pd.Series) -> str:
    if seconds.empty:
        return ""
    low, middle, high = seconds.quantile([0.25, 0.5, 0.75])
    return Markup(f"{middle:.2f}" + (f"<br><small>{low:.2f} to {high:.2f}</small>" if len(seconds) > 1 else ""))


def _number(value: float, look: str, missing: str = "") -> str:
    return missing if pd.isna(value) else format(value, look)


def cost_summary(measured: pd.DataFrame) -> pd.DataFrame:
    """Median seconds and peak memory (MiB) of one edit alone, a row per subject, dataset and editor."""
    groups = _rows(measured, "edit").groupby(["subject", "dataset", "editor"], sort=False)
    return groups[["seconds", "peak_mib"]].median().round(3)


def _labels(measured: pd.DataFrame) -> list[str]:
    """Each row's subject, with the weights, dtype, machine and threads where these are needed to tell rows apart."""
    machines = measured["machine"].nunique() > 1
    threads = measured[measured["device"] == "cpu"]["threads"].nunique() > 1
    kinds = measured["dtype"].nunique() > 1 or bool(measured["random_weights"].any())

    def label(row: dict) -> str:
        said = {"random weights": row["random_weights"], row["dtype"]: kinds, row["machine"]: machines}
        said[f"{row['threads']} threads"] = threads and row["device"] == "cpu"
        parts = [what for what, needed in said.items() if needed]
        return row["subject"] + (f" ({', '.join(parts)})" if parts else "")

    return [label(row) for row in measured.to_dict("records")]


def _rows(measured: pd.DataFrame, *kinds: str) -> pd.DataFrame:
    """Rows of some kinds, with columns ``label`` and ``error``; random weights last, datasets and editors in the study's order."""
    labelled = measured.assign(label=_labels(measured), error=measured.get("error"))
    labels = list(labelled.sort_values("random_weights", kind="stable")["label"].unique())
    ranks = {"label": labels, "dataset": list(PAPER_CASES), "editor": list_editors()}
    return labelled[labelled["kind"].isin(kinds)].sort_values(
        list(ranks), key=lambda names: names.map({name: n for n, name in enumerate(ranks[names.name])}), kind="stable"
    )


def _edits_of_the_model(measured: pd.DataFrame) -> pd.DataFrame:
    """Edits made alone, except edits that only put text before prompts: making these takes no time, whatever they cost later."""
    edits = _rows(measured, "edit")
    return edits[~(edits["added_tokens"] > 0)] if "added_tokens" in edits else edits


def cost_figure(measured: pd.DataFrame):
    """The paper's figure of the time per edit: medians with quartiles, a panel for each dataset; a matplotlib figure."""
    import seaborn as sns

    edits = _edits_of_the_model(measured)
    subjects, editors = edits["label"].unique(), in_order(edits["editor"].unique())
    figure, axes = panels(1, edits["dataset"].nunique(), 4.6, 3.2, sharey=True)
    looks = list(zip(sns.color_palette("colorblind", len(subjects)), "osD^vPX*<>" * len(subjects)))
    for axis, (dataset, of_dataset) in zip(axes[0], edits.groupby("dataset", sort=False)):
        for n, (subject, (colour, marker)) in enumerate(zip(subjects, looks)):
            seconds = of_dataset[of_dataset["label"] == subject].groupby("editor")["seconds"]
            low, middle, high = (seconds.quantile(share).reindex(editors) for share in (0.25, 0.5, 0.75))
            counts = seconds.count().reindex(editors, fill_value=0)
            places = positions(axis, n, len(subjects), len(editors), counts)
            look = {"fmt": marker, "color": colour, "ms": 4, "elinewidth": 0.8, "label": plain(subject)}
            axis.errorbar(places, middle, yerr=[middle - low, high - middle], **look)
        axis.set_yscale("log")
        axis.set_xticks(range(len(editors)), [plain(editor_name(name)) for name in editors], rotation=40, ha="right")
        axis.set_title(plain(dataset_title(str(dataset))))
    axes[0][0].set_ylabel("seconds per edit")
    return legend(figure, axes, top=0.98, columns=2, loc="lower center")


@table
def throughput_table(measured: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Edits per second, without and with their evaluation, by batch size; ``n`` is the number of cases behind each rate."""
    batches = _rows(measured, "throughput").groupby(["label", "dataset", "editor"], sort=False)
    for (subject, dataset, editor), of_editor in batches:
        row = {"Subject": subject, "Data": dataset_title(dataset), "Editor": editor_name(editor)}
        # each batch is timed once, so its size is its number of cases
        timed = of_editor[of_editor["error"].isna()]
        row["n"] = " and ".join(map(str, sorted(timed["batch"].astype(int)))) or "0"
        for what, rates in _rates(of_editor).items():
            row |= {f"{what}, batch {size}": _number(rate, ".3g", missing=_TOO_LARGE) for size, rate in rates.items()}
        yield row


def _rates(batches: pd.DataFrame) -> pd.DataFrame:
    """For one editor and dataset: edits and evaluated cases per second by batch size (NaN: it did not fit into memory)."""
    by_size = batches.set_index(batches["batch"].astype(int)).sort_index()
    whole = by_size["edit_seconds"] + by_size["evaluate_seconds"]
    return pd.DataFrame({"edits/s": by_size.index / by_size["edit_seconds"], "with evaluation": by_size.index / whole})


@table
def floor_table(measured: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Measured time divided by the floor (floor.py): medians over cases edited alone."""
    names = list(measured["dataset"].dropna().unique())
    rates = _device_rates(measured)
    for (subject, editor), edits in _rows(measured, "edit").groupby(["label", "editor"], sort=False):
        if subject not in rates or not all(edits["phases"]):
            continue  # this editor's operations have not been counted
        device = rates[subject]
        phases = [[Phase(*phase) for phase in of_case] for of_case in edits["phases"]]
        timed = edits.assign(floor=[device.seconds(of_case) for of_case in phases])
        timed["ratio"] = timed["seconds"] / timed["floor"]
        medians = timed.groupby("dataset")[["floor", "ratio"]].median().reindex(names)
        counts = sorted(set(timed.groupby("dataset").size()))
        row = {"Subject": subject, "Editor": editor_name(editor), "n": " and ".join(map(str, counts))}
        row |= {f"{dataset_title(name)} floor s": _number(medians["floor"][name], ".3f") for name in names}
        row |= {f"{dataset_title(name)} measured / floor": _number(medians["ratio"][name], ".1f") for name in names}
        longest = [max(of_case, key=lambda phase: device.seconds([phase])) for of_case in phases]
        bound = [phase.operations / device.operations > phase.traffic / device.traffic for phase in longest]
        row["longest phase"] = pd.Series([phase.name for phase in longest]).mode()[0]
        row["bound by"] = "arithmetic" if np.mean(bound) > 0.5 else "memory"
        yield row


@table
def whole_case_floor_table(measured: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Editing and evaluating a batch: measured seconds per case, the floor, and the floor's share of the measured time.

    The floor adds up the operations of a batch's cases, and counts weights that are read for all of them once.
    """
    timed, rates = _rows(measured, "throughput"), _device_rates(measured)
    for row in timed[timed["error"].isna()].to_dict("records"):
        if row["label"] not in rates or not isinstance(row.get("phases"), list):
            continue  # measured by an earlier version of the library, which did not count operations
        device = rates[row["label"]]
        size, phases = int(row["batch"]), [Phase(*phase) for phase in row["phases"]]
        seconds, floor = row["edit_seconds"] + row["evaluate_seconds"], device.seconds(phases)
        longest = max(phases, key=lambda phase: device.seconds([phase]))
        yield {
            "Subject": row["label"],
            "Data": dataset_title(row["dataset"]),
            "Editor": editor_name(row["editor"]),
            "Batch": str(size),
            "measured s / case": f"{seconds / size:.2f}",
            "of it evaluation": f"{row['evaluate_seconds'] / size:.2f}",
            "floor s / case": f"{floor / size:.2f}",
            "floor / measured (%)": f"{100 * floor / seconds:.0f}",
            "longest phase": longest.name,
            "device, 10⁹ operations/s": f"{device.operations / 1e9:.0f}",
            "device, 10⁹ bytes/s": f"{device.traffic / 1e9:.1f}",
        }


def _device_rates(measured: pd.DataFrame) -> dict[str, Ceilings]:
    """What the device reached, by label. A machine is not always equally fast: times are compared with the rates of their own folder."""
    rates = _rows(measured, "ceiling").drop_duplicates("label").set_index("label")
    return {
        str(label): Ceilings(row["operations_per_second"], row["bytes_per_second"]) for label, row in rates.iterrows()
    }


@table
def ceiling_table(measured: pd.DataFrame) -> Iterator[dict[str, str]]:
    """The device's measured rates for a large matrix product and for a large copy (bytes read plus bytes written)."""
    for ceiling in measured[measured["kind"] == "ceiling"].to_dict("records"):
        yield {
            "Machine": ceiling["machine"],
            "dtype": ceiling["dtype"],
            "threads": str(ceiling["threads"]),
            "products (10⁹ operations/s)": f"{ceiling['operations_per_second'] / 1e9:.0f}",
            "copies (10⁹ bytes/s)": f"{ceiling['bytes_per_second'] / 1e9:.1f}",
        }


@table
def projection_table(measured: pd.DataFrame, plain: pd.DataFrame | None = None) -> Iterator[dict[str, str]]:
    """Hours that the whole study would take: all of CLMEEval's cases, edited by the nine editor variants and evaluated.

    Computed from each editor's measured rate with evaluation, one case at a time and in the best batch; a subject is projected
    only if all variants were measured on both datasets. ``plain`` is the table of ``benchmarks/whole_case.py``: the time of the fixed
    plain procedure per case, for the embedded subject on the same machine. Machines and subjects that it lacks get no such columns.
    """
    batches = measured[measured["kind"] == "throughput"]
    for name in list_subjects():
        projected = False
        for (_, _, _, machine, threads), of_place in batches[batches["subject"] == name].groupby(_PLACE, sort=False):
            rates = {pair: _rates(rows)["with evaluation"] for pair, rows in of_place.groupby(["dataset", "editor"])}
            alone = _hours({pair: 1 / of_pair.get(1, np.nan) for pair, of_pair in rates.items()})
            best = _hours({pair: 1 / of_pair.max() for pair, of_pair in rates.items()})
            if alone is None or best is None:
                continue
            projected = True
            row = {"Subject": name, "Machine": machine, "one case at a time (h)": f"{alone:.0f}"}
            row |= {"in batches (h)": f"{best:.0f}", "ratio": f"{alone / best:.1f}"}
            if plain is not None and load_settings(name).subject.source == "embedded":
                there = plain[(plain["device"] == machine) & (plain["threads"] == threads)]
                if (slow := _plain_hours(there)) is not None:
                    row |= {"plain procedure (h)": f"{slow:.0f}", "plain / in batches": f"{slow / best:.1f}"}
            yield row
        if not projected:
            yield {"Subject": name, "Machine": _NOT_MEASURED}


def _hours(seconds: dict[tuple[str, str], float]) -> float | None:
    """Hours for all of the paper's cases and variants, from the seconds per case of each dataset and editor; None if any is missing."""
    hours = sum(seconds.get(pair, np.nan) * PAPER_CASES[pair[0]] for pair in _PAIRS) / 3600
    return None if np.isnan(hours) else hours


def _plain_hours(plain: pd.DataFrame) -> float | None:
    # prefers measurements with the subject's own values: "subject" sorts before "transferred"
    by_editor = plain.sort_values("values").drop_duplicates(["editor", "data"]).set_index(["data", "editor"])
    seconds = by_editor["plain s/case"].to_dict()
    # an encoder adds almost nothing to the time of GRACE's edit
    pairs = {(data, editor): (data, "grace" if "grace" in editor else editor) for data, editor in _PAIRS}
    return _hours({pair: seconds.get(timed, np.nan) for pair, timed in pairs.items()})


def findings(measured: pd.DataFrame) -> dict[str, Any]:
    """What was measured, and which of the paper's orderings the measurements confirm. Editors and datasets are named by their titles;
    editors that only put text before prompts are left out.

    Returns:
        ``costs``: a row for each subject (its label) and dataset, with the ``fastest`` and the ``slowest`` editor by median
        seconds of an edit, and these medians (``least`` and ``most``). ``malmen``: the number of ``pairs`` of subject and dataset
        that have MALMEN, MEMIT and PMET, and in how many MALMEN is the ``fastest``, or MEMIT or PMET the ``slowest``.
        ``csne_longer``: the number of ``pairs`` of subject and editor, and in how many CSNE takes ``longer``. ``shapes``: among
        subjects with random weights, by the editors measured on all of them, the subjects with the largest median ``seconds`` and
        ``peak_mib``. ``half``: ``gib``, ``editor`` and ``subject`` of the largest peak in 16 bits. These four are None if there
        is nothing to count. ``too_large``: for each subject, the editors that did not fit into memory. ``on_gpu``: whether
        anything was measured on a GPU. ``unmeasured``: registered subjects without measurements.
    """
    edits, setups = _edits_of_the_model(measured), _rows(measured, "setup")
    medians = edits.groupby(["label", "dataset", "editor"], sort=False)["seconds"].median().unstack("editor")
    costs = {"least": medians.min(axis=1), "most": medians.max(axis=1)}
    costs |= {"fastest": medians.idxmin(axis=1).map(editor_name), "slowest": medians.idxmax(axis=1).map(editor_name)}
    failed = setups[setups["error"].notna()].groupby("label")["editor"]
    shown: dict[str, Any] = {
        "costs": pd.DataFrame(costs).rename(index=dataset_title, level="dataset"),
        **dict.fromkeys(("malmen", "csne_longer", "shapes", "half")),
        "too_large": {label: list(map(editor_name, sorted(set(editors)))) for label, editors in failed},
        "on_gpu": bool((measured["device"] == "cuda").any()),
        "unmeasured": unmeasured(measured),
    }
    if {"malmen", "memit", "pmet"} <= set(medians.columns):
        whole = medians.dropna(subset=["malmen", "memit", "pmet"])
        first, last = whole.idxmin(axis=1) == "malmen", whole.idxmax(axis=1).isin(["memit", "pmet"])
        shown["malmen"] = {"pairs": len(whole), "fastest": first.sum(), "slowest": last.sum()}
    if set(PAPER_CASES) <= set(medians.index.get_level_values("dataset")):
        both = medians.stack().unstack("dataset").dropna()
        shown["csne_longer"] = {"pairs": len(both), "longer": (both[CSNE.name] > both[CNLE.name]).sum()}
    # compare only editors measured on every such subject: some may not have fitted into memory
    random = edits[edits["random_weights"]]
    common = random.groupby("editor")["subject"].transform("nunique") == random["subject"].nunique()
    shapes = random[common].groupby("subject", sort=False)[["seconds", "peak_mib"]].median()
    if len(shapes) > 1:
        shown["shapes"] = shapes.idxmax().to_dict()
    half = edits[edits["dtype"].isin(["bfloat16", "float16"]) & edits["peak_mib"].notna()]
    if len(half):
        largest = half.loc[half["peak_mib"].idxmax()]
        editor, gib = editor_name(largest["editor"]), largest["peak_mib"] / 1024
        shown["half"] = {"gib": gib, "editor": editor, "subject": largest["label"]}
    return shown
