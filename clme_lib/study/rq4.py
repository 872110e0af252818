"""RQ4's runs, table and figure: many edits in one model, computed from the records of several runs.

Each run has one protocol and one sample, in its own folder (``<out>/<protocol>-<sample>``); edits follow the sample's order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd

from ..datasets.base import dataset_title
from ..editors.base import EDITORS
from ..editors.registry import get_editor
from ..metrics.base import get_metric
from ..support.errors import StudyError
from .config import ManyEditsConfig, RunConfig, make_config
from .figures import panels, plain
from .paper import UNEDITED
from .protocols import get_protocol, protocol_title
from .run_folder import is_published, load_run
from .runs import run, sampled
from .tables import Interval, editor_colour, editor_name, interval, mean_over_tokens, percent, scored, table

ENDS = 10  # number of first and of last edits of a sequence that are also shown separately
SHOWN = ("effectiveness_em", "generalization_em", "specificity_rate")
_MARKERS = "os^DvPX*<>"
_KINDS = {True: "weights updated", False: "weights unchanged"}


def run_many(config: ManyEditsConfig) -> pd.DataFrame:
    """Complete the runs of all protocols and samples and return their records, with columns ``sample`` and ``turn`` (each case's index in its
    sequence, from 0; held-out cases come after all others). A protocol that joins weight updates leaves out the editors that make none. Where
    ``out`` holds published runs, only these are shown, each with what it has of the datasets, editors and held-out cases that are asked for.
    StudyError if nothing is left."""
    frames = []
    keys = [(protocol, sample) for protocol in config.protocols for sample in config.samples]
    published = any(map(is_published, config.out.glob("*-*")))  # nothing is made beside published runs
    for protocol, sample in keys:
        for own in (_published_runs if published else _runs)(config, protocol, sample):
            records = run(own)
            turns = {(name, case.case_id): n for name in own.dataset for n, case in enumerate(sampled(own, name))}
            # a published run may have held out other cases than this sample's last
            turn = [turns.get(key, len(turns)) for key in zip(records["dataset"], records["case_id"])]
            frames.append(records.assign(sample=sample, turn=turn))
    if not frames:
        raise StudyError(
            f"editors: none of {', '.join(config.editors)} has records of samples {', '.join(map(str, config.samples))} in {config.out}, or can be "
            f"joined by {', '.join(config.protocols)}"
        )
    return pd.concat(frames, ignore_index=True)


def _folder(config: ManyEditsConfig, protocol: str, sample: int) -> Path:
    return config.out / f"{protocol}-{sample}"


def _runs(config: ManyEditsConfig, protocol: str, sample: int) -> Iterator[RunConfig]:
    """The run of a protocol and a sample, unless it has no editors."""
    joins = type(get_protocol(protocol)).joins_weights
    if editors := [editor for editor in config.editors if not joins or get_editor(editor).updates_weights]:
        yield _of_many(config, protocol, sample, editors=tuple(editors))


def _published_runs(config: ManyEditsConfig, protocol: str, sample: int) -> Iterator[RunConfig]:
    """What a published run has of the datasets and editors; neither its editors nor its held-out cases need be the same for all datasets."""
    folder = _folder(config, protocol, sample)
    if not is_published(folder):
        return
    records = load_run(folder)
    for name in config.dataset:
        rows = records[records["dataset"] == name]
        held_out = config.held_out if rows["held_out"].any() else 0
        if editors := [editor for editor in config.editors if editor in set(rows["editor"])]:
            yield _of_many(config, protocol, sample, dataset=(name,), editors=tuple(editors), held_out=held_out)


def _of_many(config: ManyEditsConfig, protocol: str, sample: int, **own: Any) -> RunConfig:
    fields = {field: getattr(config, field) for field in RunConfig.model_fields}
    folder = _folder(config, protocol, sample)
    name = f"{config.name}-{folder.name}" if config.name else None
    return make_config(**{**fields, "protocol": protocol, "sample": sample, "out": folder, "name": name, **own})


@table
def retention_table(records: pd.DataFrame) -> Iterator[dict[str, str]]:
    """How many edits still hold (of all, of the first ten and of the last ten) and neighbours stay unchanged, as edits accumulate in the model.

    Shares in percent with 95% intervals over cases and samples; seconds are the mean time per edit, over the edits in the model; MiB are the
    tensors of all edits together.
    """
    for (dataset, protocol, editor, held), rows in _states(records):
        row = {
            "Data": dataset_title(dataset),
            "Protocol": protocol_title(protocol),
            "Editor": editor_name(editor),
            "Edits": str(held),
            "n": str(len(rows)),
        }
        for name in SHOWN:
            row[get_metric(name).title] = _share(rows, rows[name], get_metric(name).binary)
        early, late = rows[rows["turn"] < ENDS], rows[rows["turn"] >= held - ENDS]
        whole = held > ENDS
        row[f"Eff. EM, first {ENDS}"] = _share(early, early["effectiveness_em"], True) if whole else "–"
        row[f"Eff. EM, last {ENDS}"] = _share(late, late["effectiveness_em"], True) if whole else "–"
        if "free_effectiveness_em" in rows and rows["free_effectiveness_em"].notna().any():
            row[get_metric("free_effectiveness_em").title] = _share(rows, rows["free_effectiveness_em"], True)
        row["s / edit"] = f"{rows['edit_seconds'].mean():.2f}"
        row["MiB"] = f"{rows['edits_mib'].mean():.3g}" if rows["edits_mib"].notna().any() else "–"
        yield row


@table
def orders_table(records: pd.DataFrame) -> Iterator[dict[str, str]]:
    """What other cases, in another order, give: mean effectiveness and share of neighbours unchanged of each sample, in percent, for the
    editors that have several samples, with the largest number of edits that all of these have."""
    samples = sorted(records["sample"].unique())
    edited = scored(records[~records["held_out"] & (records["editor"] != UNEDITED)])
    for (dataset, protocol, editor), rows in edited.groupby(["dataset", "protocol", "editor"], sort=False):
        reached = [set(of_sample["position"]) for _, of_sample in rows.groupby("sample")]
        if len(reached) < 2:
            continue
        held = max(set.intersection(*reached))
        row = {
            "Data": dataset_title(str(dataset)),
            "Protocol": protocol_title(str(protocol)),
            "Editor": editor_name(str(editor)),
            "Edits": str(held),
        }
        for name in ("effectiveness_em", "specificity_rate"):
            means = rows[rows["position"] == held].groupby("sample")[name].mean()
            titles = {sample: f"{get_metric(name).title}, sample {sample}" for sample in samples}
            row |= {title: percent(means[n]) if n in means else "–" for n, title in titles.items()}
        yield row


@table
def learning_table(records: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Whether later edits are learnt as well as the first ones: the loss (nats per token of the target) at which the optimisation of each
    edit stopped, means over the first ten and over the last ten edits, with 95% intervals over cases and samples.

    Of the state with the most edits, if it holds at least twenty, of editors that make several steps.
    """
    largest: dict[tuple[str, str, str], tuple[int, pd.DataFrame]] = {}
    for (dataset, protocol, editor, held), rows in _states(records):
        which = dataset, protocol, editor
        learnt = rows[(rows["steps"] > 1) & rows["loss"].notna()]
        if held >= 2 * ENDS and len(learnt) and held >= largest.get(which, (0,))[0]:
            largest[which] = held, learnt
    for (dataset, protocol, editor), (held, rows) in largest.items():
        ends = rows[rows["turn"] < ENDS], rows[rows["turn"] >= held - ENDS]
        first, last = (interval(end["loss"], False, shares=False, samples=end["sample"]) for end in ends)
        yield {
            "Data": dataset_title(dataset),
            "Protocol": protocol_title(protocol),
            "Editor": editor_name(editor),
            "Edits": str(held),
            f"Loss, first {ENDS}": _loss(first),
            f"Loss, last {ENDS}": _loss(last),
        }


def _loss(mean: Interval) -> str:
    return f"{mean.mean:.2f}" + ("" if np.isnan(mean.low) else f" ({mean.low:.2f}–{mean.high:.2f})")


@table
def ability_table(records: pd.DataFrame) -> Iterator[dict[str, str]]:
    """What the model can still do: scores on held-out cases as edits accumulate in it.

    Perplexity is over all target tokens of these cases, given their prompts. *Runs* (without an error, whether right or wrong) and
    *Executes* (and passes the test) are over the cases that have a check.
    """
    for (dataset, protocol, editor, held), rows in _states(records, held_out=True):
        executes, wrong = (
            rows[name] if name in rows else pd.Series(dtype=float)
            for name in ("free_effectiveness_executes", "fails_wrong")
        )
        yield {
            "Data": dataset_title(dataset),
            "Protocol": protocol_title(protocol),
            "Editor": editor_name(editor),
            "Edits": str(held),
            "n": str(len(rows)),
            "Perplexity": _perplexity(rows),
            get_metric("effectiveness_em").title: _share(rows, rows["effectiveness_em"], True),
            "Runs": _share(rows, executes + wrong, True),
            "Executes": _share(rows, executes, True),
            get_metric("specificity_rate").title: _share(rows, rows["specificity_rate"], False),
        }


def ability_findings(records: pd.DataFrame) -> list[dict[str, Any]]:
    """For each dataset, protocol and editor: perplexity on held-out cases in the state with the most edits, the unedited model's on the
    same cases, and their ratio with its 95% interval, which is of pairs. The unedited model's may come from another protocol."""
    states = list(_states(records, held_out=True))
    cases = ["sample", "case_id"]
    unedited: dict[str, pd.DataFrame] = {}
    for (dataset, _, editor, _), rows in states:
        if editor == UNEDITED:
            known = [unedited[dataset]] if dataset in unedited else []
            unedited[dataset] = pd.concat([*known, rows[[*cases, "target_loss"]]]).drop_duplicates(cases)
    most: dict[tuple[str, str, str], tuple[int, pd.DataFrame]] = {}
    for (dataset, protocol, editor, held), rows in states:
        if editor != UNEDITED and held >= most.get((dataset, protocol, editor), (0,))[0]:
            most[dataset, protocol, editor] = held, rows
    rows_of_findings = []
    for (dataset, protocol, editor), (held, rows) in most.items():
        if dataset not in unedited:
            continue
        pairs = rows.merge(unedited[dataset], on=cases, suffixes=("", "_unedited"))
        losses = pairs["target_loss_unedited"], pairs["target_loss"]
        before, after, change = (_mean_loss(pairs, of) for of in (*losses, losses[1] - losses[0]))
        if np.isfinite([before.mean, after.mean]).all():
            ratio = [float(np.exp(bound)) for bound in (change.mean, change.low, change.high)]
            perplexity = [float(np.exp(loss.mean)) for loss in (after, before)]
            shown = {"dataset": dataset, "protocol": protocol, "editor": editor, "held": held, "n": len(pairs)}
            rows_of_findings.append({**shown, "perplexity": perplexity, "ratio": ratio})
    return rows_of_findings


def _mean_loss(rows: pd.DataFrame, losses: pd.Series) -> Interval:
    """Mean of the rows' ``losses`` over tokens; infinite if a case's loss is, which its record has as null."""
    if losses.isna().any():
        return Interval(float("inf"), float("nan"), float("nan"), len(losses))
    return mean_over_tokens(list(losses), list(rows["target_tokens"]), list(rows["sample"]))


def _perplexity(rows: pd.DataFrame) -> str:
    loss = _mean_loss(rows, rows["target_loss"])
    if np.isinf(loss.mean):
        return "∞"
    bounds = "" if np.isnan(loss.low) else f" ({np.exp(loss.low):.3g}–{np.exp(loss.high):.3g})"
    return f"{np.exp(loss.mean):.3g}{bounds}"


def retention_figure(records: pd.DataFrame) -> Any:
    """Effectiveness, generalization and neighbours unchanged over the number of edits: a line for each editor, a row of panels for each
    dataset, protocol and kind of editor, which updates weights or leaves them as they are."""
    from matplotlib.ticker import NullLocator

    records = scored(records[~records["held_out"] & (records["editor"] != UNEDITED)])
    markers = dict(zip(records["editor"].unique(), cycle(_MARKERS)))  # some editors have similar colours
    kinds = records["editor"].map(lambda name: _KINDS[name not in EDITORS or EDITORS[name].updates_weights])
    groups = list(records.groupby([records["dataset"], records["protocol"], kinds], sort=False))
    figure, axes = panels(len(groups), len(SHOWN), 3.0, 2.4, sharex=True)
    for row, ((dataset, protocol, kind), of_group) in enumerate(groups):
        names = list(of_group["editor"].unique())
        for place, (editor, rows) in enumerate(of_group.groupby("editor", sort=False)):
            dodged = 1.05 ** (place - (len(names) - 1) / 2)  # so that intervals do not hide each other
            for axis, name in zip(axes[row], SHOWN):
                shares = {
                    held: interval(of_state[name], get_metric(name).binary, samples=of_state["sample"])
                    for held, of_state in rows.groupby("position")
                }
                middle, low, high = (
                    np.array([100 * getattr(share, bound) for share in shares.values()])
                    for bound in ("mean", "low", "high")
                )
                axis.errorbar(
                    dodged * np.array(list(shares)), middle, [middle - low, high - middle], marker=markers[editor], ms=4, lw=1,
                    elinewidth=0.6, color=editor_colour(str(editor)), label=plain(editor_name(str(editor))),
                )  # fmt: skip
        for axis, name in zip(axes[row], SHOWN):
            axis.set(xscale="log", ylim=(-3, 103), title=get_metric(name).title if row == 0 else "")
            axis.set_xlabel("edits in the model" if row == len(groups) - 1 else "")
        named = way_of(records, str(dataset), str(protocol))
        axes[row][0].set_ylabel(fill(f"{plain(named)} (%)", 20))
        axes[row][-1].legend(title=kind, loc="center left", bbox_to_anchor=(1.02, 0.5))
    held = sorted(records["position"].unique())
    axes[0][0].set_xticks(held, list(map(str, held)), minor=False)
    axes[0][0].xaxis.set_minor_locator(NullLocator())
    figure.tight_layout()
    return figure


def way_of(records: pd.DataFrame, dataset: str, protocol: str) -> str:
    """A protocol's name in figures and sentences, with the dataset's where the records have several."""
    title = protocol_title(protocol)
    return title if records["dataset"].nunique() == 1 else f"{dataset_title(dataset)}, {title}"


def ends(records: pd.DataFrame) -> pd.DataFrame:
    """Records of each editor's last state and, to compare editors with, of the states with the number of edits at which most of a dataset's
    sequences, of all editors and samples, end."""
    editors = ["dataset", "protocol", "editor"]
    last = records.groupby(editors)["position"].transform("max")
    of_samples = records.groupby([*editors, "sample"])["position"].max().reset_index()
    usual = of_samples.groupby("dataset")["position"].agg(lambda ends: ends.mode().max())
    return records[(records["position"] == records["dataset"].map(usual)) | (records["position"] == last)]


def findings(records: pd.DataFrame) -> list[dict[str, Any]]:
    """For each dataset, protocol and editor: mean scores (``SHOWN``) in the first evaluated state and in the state with the most edits."""
    rows = []
    states = dict(_states(records))
    for dataset, protocol, editor in dict.fromkeys(key[:3] for key in states):
        held = sorted(key[3] for key in states if key[:3] == (dataset, protocol, editor))
        ends = [states[dataset, protocol, editor, count] for count in (held[0], held[-1])]
        scores = {name: [float(end[name].mean()) for end in ends] for name in SHOWN}
        rows.append({"dataset": dataset, "protocol": protocol, "editor": editor, "held": [held[0], held[-1]], **scores})
    return rows


def _states(records: pd.DataFrame, held_out: bool = False) -> Iterator[tuple[tuple[str, str, str, int], pd.DataFrame]]:
    """Each state's scored records: of the cases edited in it or, with ``held_out``, of the held-out cases."""
    groups: Sequence[str] = ("dataset", "protocol", "editor", "position")
    records = records[records["held_out"] == held_out]
    for (dataset, protocol, editor, held), rows in scored(records).groupby(list(groups), sort=False):
        yield (str(dataset), str(protocol), str(editor), int(held)), rows


def _share(rows: pd.DataFrame, values: pd.Series, binary: bool) -> str:
    """The mean of ``values``, which belong to ``rows`` or are empty, with its interval."""
    share = interval(values, binary, samples=rows["sample"].loc[values.index])
    if not share.n:
        return "–"
    bounds = "" if np.isnan(share.low) else f" ({percent(share.low)}–{percent(share.high)})"
    return f"{percent(share.mean)}{bounds}"
