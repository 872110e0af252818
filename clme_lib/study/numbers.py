"""The numbers in the book's prose, computed from the published records and written to files that the pages read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd

from ..datasets.base import dataset_title
from ..datasets.embedded_cnle import read_rows
from ..datasets.paper import CNLE
from ..evaluation.records import UNKNOWN
from ..metrics.base import MEASURES, get_metric
from ..metrics.free import opens_with_fence
from ..metrics.text import bleu
from ..subjects.adapters import provenance
from ..subjects.settings import load_settings
from ..support.display import Markup, inline_code
from ..support.journal import write_text
from .appendices.selection import all_values, differing_values
from .paper import UNEDITED
from .rq1 import prompt_findings
from .run_folder import load_manifest, load_run
from .scorecard import CLAIMS, counts, load_evidence
from .tables import cells, editor_name, in_order, interval, percent, to_markdown

PUBLISHED = "smollm2-135m"
CODE_SUBJECT = "smollm2-135m-code"


def write_numbers(results: Path) -> None:
    """Write the files that the pages read: ``numbers.json``, numbers as text, by name; ``hyperparameters.csv``, all values of the registered
    subjects; and ``hyperparameters_differing.csv``, the values in which the published run's subject differs from the paper's."""
    write_text(results / "numbers.json", json.dumps(prose_numbers(results), indent=1, ensure_ascii=False) + "\n")
    all_values().to_csv(results / "hyperparameters.csv", index=False)
    differing_values(own=PUBLISHED).to_csv(results / "hyperparameters_differing.csv", index=False)


def prose_numbers(results: Path) -> dict[str, str]:
    """Every number of the prose, by the name that pages use for it, as ``{{ name }}``."""
    folder = results / "runs" / PUBLISHED
    records = load_run(folder)
    counts = records.groupby(["dataset", "editor"]).size()
    numbers = {
        "run_cases": " to ".join(map(str, dict.fromkeys((counts.min(), counts.max())))),
        "run_folder": f"`results/runs/{folder.name}`",
        "run_table": provenance_table(load_manifest(folder)["starts"], records),
        "checks": str(len(read_rows("cnle-checks"))),
        "claims": str(len(CLAIMS)),
        **_verdicts(results),
        **_code_subject(results),
        **_marker(results),
    }
    for prefix, of_subject in (("", records), ("code_", load_run(results / "runs" / CODE_SUBJECT))):
        for (dataset, editor), rows in of_subject.groupby(["dataset", "editor"]):
            shares = {measure: interval(rows[f"{measure}_em"], binary=True).mean for measure in MEASURES}
            shares["kept"] = interval(rows["specificity_rate"], binary=False).mean
            for name, share in shares.items():
                numbers[f"{prefix}{dataset}_{editor.replace('-', '_')}_{name}"] = f"{percent(share)}%"
        compared = prompt_findings(of_subject[~of_subject["editor"].str.contains("-wo-")])
        for dataset, shown in compared.items():
            numbers[f"{prefix}{dataset.lower()}_ahead_of_prompt"] = ", ".join(shown["ahead"]) or "no editor"
    return numbers


def _verdicts(results: Path) -> dict[str, str]:
    """How many of the scorecard's comparisons have each verdict, for the chat model and for the code model."""
    of_subjects = counts(load_evidence(results, (PUBLISHED, CODE_SUBJECT)))
    names = {"chat_verdicts": PUBLISHED, "code_verdicts": CODE_SUBJECT}
    listed = {
        name: [f"{count} {verdict}" for verdict, count in of_subjects[subject].items()]
        for name, subject in names.items()
    }
    return {name: ", ".join(verdicts) for name, verdicts in listed.items()}


def _code_subject(results: Path) -> dict[str, str]:
    """How the subject trained on code was made, and how this training changed its loss on texts of held-out packages and its unedited
    answers."""
    made = provenance(CODE_SUBJECT)
    return {
        "code_unedited": to_markdown(
            cells(map(_unedited_row, (results / "runs" / PUBLISHED, results / "runs" / CODE_SUBJECT)))
        ),
        "code_texts": f"{made.texts:,}",
        "code_tokens": f"{made.tokens:,}",
        "code_minutes": f"{made.seconds / 60:.0f}",
        "code_threads": str(made.threads),
        "code_held_out": ", ".join(made.held_out),
        "code_losses": to_markdown(
            cells(
                {
                    "Held-out": f"{kind}s",
                    "texts": str(made.held_out_texts[kind]),
                    "before": f"{before:.3f}",
                    "after": f"{made.losses_after[kind]:.3f}",
                    "perplexity": f"{100 * (math.exp(made.losses_after[kind] - before) - 1):+.0f}%",
                }
                for kind, before in made.losses_before.items()
            )
        ),
    }


def _marker(results: Path) -> dict[str, str]:
    """What the name of the end-of-text token adds to BLEU: specificity of ROME's edits of the code model, with and without the name."""
    marker = load_settings(CODE_SUBJECT).subject.eos_token
    assert marker is not None, "the code subject's settings name its end-of-text token"
    records = load_run(results / "runs" / CODE_SUBJECT, editors=[UNEDITED, "rome"])
    texts = records[records["dataset"] == CNLE.name].pivot(
        index="case_id", columns="editor", values="generated_specificity"
    )
    pairs = [(edited, plain) for edited, plain in texts.dropna()[["rome", UNEDITED]].to_numpy()]
    kept = interval([bleu(edited, plain) for edited, plain in pairs], binary=False)
    removed = [[[text.replace(marker, "") for text in of_model] for of_model in pair] for pair in pairs]
    without = interval([bleu(edited, plain) for edited, plain in removed], binary=False)
    shown = {"code_rome_bleu": kept, "code_rome_bleu_without_marker": without}
    return {name: f"{percent(score.mean)}%" for name, score in shown.items()}


def _unedited_row(folder: Path) -> dict[str, str]:
    """A summary of what a run's unedited subject writes after CNLE's prompts."""
    records = load_run(folder, editors=[UNEDITED])[lambda rows: rows["dataset"] == CNLE.name]
    answers = [text for texts in records["generated_specificity"] for text in texts]
    row = {"Subject": folder.name, "n": str(len(records))}
    row["neighbours answered in a code fence"] = f"{percent(sum(map(opens_with_fence, answers)) / len(answers))}%"
    for name in ("effectiveness_bleu", "effectiveness_rouge_l", "parses", "stops", "free_effectiveness_executes"):
        shown = interval(records[name], get_metric(name).binary) if name in records else None
        row[get_metric(name).title] = "not measured" if shown is None or shown.n == 0 else str(shown)
    return row


def provenance_table(starts: list[dict], records: pd.DataFrame) -> str:
    """A Markdown table of a run's starts: the time, hardware and program of each, and how many of the records it made.

    Args:
        starts: as the run's ``run.json`` lists them.
        records: the run's records; those whose start is unknown are counted in the last rows, by editor.
    """
    rows = []
    for start in sorted(starts, key=lambda start: start["started"]):
        hardware, versions = start["hardware"], start["versions"]
        threads = "" if hardware["device"] == "cuda" else f", threads: {hardware['threads']}"
        made_by = (
            Markup(f"library {inline_code(start['library'][:10])}")
            if start["commit"] == UNKNOWN
            else _commit(start["commit"])
        )
        rows.append(
            {
                "Start": start["started"][:16].replace("T", " "),
                "Editors": ", ".join(map(editor_name, in_order(start["hyperparameters"]))),
                "Records": _counted(records[records["start"] == start["id"]]),
                "Hardware": hardware["name"] + threads,
                "PyTorch, Transformers": f"{versions['torch']}, {versions['transformers']}",
                "Program": made_by,
            }
        )
    unknown = records[records["start"] == UNKNOWN]
    for editor in in_order(unknown["editor"].unique()):
        of_editor = unknown[unknown["editor"] == editor]
        commits = of_editor["commit"].unique()
        row = {"Start": UNKNOWN, "Editors": editor_name(editor), "Records": _counted(of_editor)}
        rows.append(row | {"Program": _commit(commits[0]) if len(commits) == 1 else UNKNOWN})
    return to_markdown(cells(rows).fillna(""))


def _commit(commit: str) -> str:
    return UNKNOWN if commit == UNKNOWN else Markup(f"commit {inline_code(commit[:10])}")


def _counted(records: pd.DataFrame) -> str:
    counts = records.groupby("dataset", sort=False).size()
    return (
        ", ".join(f"{count} {dataset_title(str(dataset))}" for dataset, count in counts.items())
        or "none that can be proved"
    )


if __name__ == "__main__":
    write_numbers(Path("results"))
