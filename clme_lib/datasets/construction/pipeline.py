"""Both data sets from their sources, stage by stage (paper section III-C).

CNLE::

    collect      intent and snippet of each mined pair; unusable ones dropped with a reason
    score        relevance in five levels
    select       very relevant ones; intents that occur again dropped
    split        targeted and not, in seeded order
    neighbours   five non-targeted intents nearest to each targeted one
    rephrase     each targeted intent in other words
    answers      the subject's own continuations of the neighbours (only when a subject is named)
    write        EditConala.json in the published layout, and what ``clme data check`` finds in it

CSNE::

    collect      code without docstring and comments, and the docstring's first sentence
    select       at most 256 tokens; functions and descriptions that occur again dropped
    split        the test part targeted, train and validation not (without parts: seeded)
    rephrase     each targeted function with other names, verified
    neighbours, answers, write
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from ...support.errors import StudyError
from ...support.journal import read_rows
from ...support.seeds import seeded_order
from .. import published
from ..base import DataSet
from ..cases import Case
from ..neighbours import Embedder, nearest, tfidf
from ..paper import CNLE, CSNE, PAPER_DATASETS
from .checking import Report, check_file
from .relevance import LEVELS
from .rephrasing import GivenIntents
from .sources import collect_functions, collect_pairs, source_files, too_long
from .stages import Row, Stages, file_sha256, kept

MAX_TOKENS = 256


class Scorer(Protocol):
    """Gives each pair its ``level``."""

    def settings(self) -> dict: ...
    def score(self, rows: Sequence[Row]) -> Iterator[Row]: ...


class Rephraser(Protocol):
    """Gives each targeted row its ``rephrased`` input."""

    def settings(self) -> dict: ...
    def rephrase(self, rows: Sequence[Row]) -> Iterator[Row]: ...


def build_cnle(
    folder: Path,
    source: str,
    scorer: Scorer,
    rephraser: Rephraser,
    *,
    targets: int | None,
    seed: int,
    embed: Embedder = tfidf,
    subject: str | None = None,
) -> Report:
    """Build CNLE in ``folder``, or go on where it was stopped; returns the validation report of the file written.

    Args:
        source: ``embedded``, ``hub``, or a file or folder of CoNaLa rows.
        targets: how many intents are targeted at most (None: half of the selected).
        subject: whose answers to the neighbours are written into the file.

    Raises:
        StudyError: a source or endpoint fails, a stage there is of other settings, or nothing is left of the rows.
    """
    stages = Stages(folder)
    pairs = stages.run("collect", {"dataset": CNLE.name, **_source(source, CNLE)}, [], lambda _: collect_pairs(source))
    by_id = {row["id"]: row for row in pairs}
    scores = stages.run("score", scorer.settings(), kept(pairs), scorer.score)
    levels = {row["id"]: row.get("level") for row in scores}
    selected = stages.run("select", {"level": LEVELS[-1]}, kept(scores), lambda rows: _select(rows, by_id, levels))
    chosen = [by_id[row["id"]] for row in kept(selected)]
    # without a model only rows that have a second wording can be targeted
    given = isinstance(rephraser, GivenIntents)
    settings = {"targets": targets, "seed": seed, "second wording": given}
    split = stages.run("split", settings, chosen, lambda rows: _split(rows, targets, seed, given))
    targeted, pool = _halves(split, by_id)
    near = stages.run(
        "neighbours", _embedding(embed), targeted, lambda rows: _neighbours(rows, pool, "intent", "snippet", embed)
    )
    others = stages.run("rephrase", rephraser.settings(), targeted, rephraser.rephrase)
    return _finish(stages, CNLE, by_id, near, others, ("intent", "snippet"), subject)


def build_csne(
    folder: Path,
    source: str,
    rephraser: Callable[[Sequence[str]], Rephraser],
    *,
    targets: int | None,
    seed: int,
    embed: Embedder = tfidf,
    tokenizer: str | None = None,
    subject: str | None = None,
) -> Report:
    """Build CSNE in ``folder``, or go on where it was stopped; returns the validation report of the file written.

    Args:
        source: ``embedded``, ``hub``, or a file or folder of CodeSearchNet rows.
        rephraser: made from the pool's functions.
        targets: how many functions are targeted at most (None: all of the test part).
        tokenizer: counts the tokens (the paper: CodeBERT's); None: the embedded subject's.
        subject: whose answers to the neighbours are written into the file.

    Raises:
        StudyError: as :func:`build_cnle`.
    """
    stages = Stages(folder)
    functions = stages.run(
        "collect", {"dataset": CSNE.name, **_source(source, CSNE)}, [], lambda _: collect_functions(source)
    )
    by_id = {row["id"]: row for row in functions}
    settings = {"tokens": MAX_TOKENS, "tokenizer": tokenizer or "smollm2-135m"}
    selected = stages.run("select", settings, kept(functions), lambda rows: _distinct_functions(rows, tokenizer))
    chosen = [by_id[row["id"]] for row in kept(selected)]
    split = stages.run("split", {"targets": targets, "seed": seed}, chosen, lambda rows: _split(rows, targets, seed))
    targeted, pool = _halves(split, by_id)
    made = rephraser([row["code"] for row in pool])
    others = stages.run("rephrase", made.settings(), targeted, made.rephrase)
    there = {row["id"] for row in kept(others)}
    renamed = [row for row in targeted if row["id"] in there]
    near = stages.run(
        "neighbours", _embedding(embed), renamed, lambda rows: _neighbours(rows, pool, "code", "doc", embed)
    )
    return _finish(stages, CSNE, by_id, near, others, ("code", "doc"), subject)


def stage_rows(folder: Path, name: str) -> list[Row]:
    """The rows of a stage that was built before.

    Raises:
        StudyError: there are none.
    """
    files = sorted(folder.glob(f"[0-9][0-9]-{name}.jsonl"))
    rows = read_rows(files[0]) if files else []
    if not rows:
        raise StudyError(
            f"{folder}: no stage {name!r} there; build the data set first: clme data build ... --out {folder}"
        )
    return rows


def built_cases(folder: Path) -> list[Case]:
    """The cases of a data set that was built in ``folder``.

    Raises:
        StudyError: there is none, or its file is damaged.
    """
    for dataset in PAPER_DATASETS:
        if (file := folder / f"{published.layout_of(dataset).file}.json").is_file():
            return published.read(file, dataset)
    raise StudyError(f"{folder}: no data set there; build it first: clme data build ... --out {folder}")


def level_counts(folder: Path) -> pd.DataFrame:
    """Table II: how many pairs the scorer gave each level."""
    rows = stage_rows(folder, "score")
    counts = Counter(row.get("level", row.get("dropped")) for row in rows)
    names = [*LEVELS[::-1], *(name for name in counts if name not in LEVELS)]
    return pd.DataFrame([{"level": name, "pairs": counts[name], "share": counts[name] / len(rows)} for name in names])


def stage_counts(folder: Path) -> pd.DataFrame:
    """What each stage of a construction kept, and dropped for which reason."""
    rows = []
    for file in sorted(folder.glob("[0-9][0-9]-*.json")):
        manifest = json.loads(file.read_text(encoding="utf-8"))
        for what, count in manifest.get("counts", {}).items():
            rows.append({"stage": manifest["stage"], "what": what, "count": count})
    return pd.DataFrame(rows)


def _source(source: str, dataset: DataSet) -> dict[str, Any]:
    """What a source is, so that another one in its place is noticed: its files with their hashes."""
    if source == "embedded":
        return {"source": source}
    return {"source": [[file.name, file_sha256(file)] for file in source_files(dataset, source)]}


def _embedding(embed: Embedder) -> dict[str, Any]:
    return embed.settings() if hasattr(embed, "settings") else {"encoder": "tfidf"}


def _select(rows: Sequence[Row], by_id: dict, levels: dict) -> Iterator[Row]:
    seen: set[str] = set()
    for row in rows:
        intent = " ".join(by_id[row["id"]]["intent"].split()).casefold()
        reason = None if levels[row["id"]] == LEVELS[-1] else "not very relevant"
        if reason is None and intent in seen:
            reason = "intent occurs again"
        if reason is None:
            seen.add(intent)
        yield {"id": row["id"], **({"dropped": reason} if reason else {})}


def _distinct_functions(rows: Sequence[Row], tokenizer: str | None) -> Iterator[Row]:
    codes: set[str] = set()
    docs: set[str] = set()
    for row, long in zip(rows, too_long([row["code"] for row in rows], MAX_TOKENS, tokenizer)):
        code, doc = " ".join(row["code"].split()), row["doc"].casefold()
        reason = "too many tokens" if long else "function occurs again" if code in codes else None
        if reason is None and doc in docs:
            reason = "description occurs again"
        if reason is None:
            codes.add(code)
            docs.add(doc)
        yield {"id": row["id"], **({"dropped": reason} if reason else {})}


def _split(rows: Sequence[Row], targets: int | None, seed: int, given: bool = False) -> Iterator[Row]:
    """Parts of the source decide where there are any.

    Args:
        given: whether only rows with a second wording can be targeted.
    """
    by_id = {row["id"]: row for row in rows}
    order = seeded_order(by_id, "construction", seed)
    parts = {row.get("partition") for row in rows}
    if "test" in parts and parts != {"test"}:
        wanted = [one for one in order if by_id[one]["partition"] == "test"]
    else:
        wanted = [one for one in order if not given or by_id[one].get("rewritten_intent")]
        wanted = wanted if targets is not None else wanted[: len(rows) // 2]
    targeted = set(wanted[:targets])
    for one in order:
        unused = "test" in parts and parts != {"test"} and by_id[one]["partition"] == "test" and one not in targeted
        yield {
            "id": one,
            "targeted": one in targeted,
            **({"dropped": "of the test part, not needed"} if unused else {}),
        }


def _halves(split: Sequence[Row], by_id: dict) -> tuple[list[Row], list[Row]]:
    targeted = [by_id[row["id"]] for row in kept(split) if row["targeted"]]
    pool = [by_id[row["id"]] for row in kept(split) if not row["targeted"]]
    if not targeted or len(pool) < 5:
        raise StudyError(
            f"{len(targeted)} targeted rows and {len(pool)} others are left: at least 1 and 5 are needed; see the counts of each stage"
        )
    return targeted, pool


def _neighbours(targeted: Sequence[Row], pool: Sequence[Row], text: str, target: str, embed: Embedder) -> Iterator[Row]:
    found = nearest(
        [row[text] for row in targeted],
        [row[text] for row in pool],
        allowed=lambda one, other: targeted[one][target] != pool[other][target],
        embed=embed,
    )
    for row, near in zip(targeted, found):
        few = {"dropped": "fewer than five neighbours"} if len(near) < 5 else {}
        yield {"id": row["id"], "neighbours": [pool[n]["id"] for n in near], **few}


def _finish(
    stages: Stages,
    dataset: DataSet,
    by_id: dict,
    near: Sequence[Row],
    others: Sequence[Row],
    fields: tuple[str, str],
    subject: str | None,
) -> Report:
    text, target = fields
    rephrased = {row["id"]: row["rephrased"] for row in kept(others)}
    complete = [row for row in kept(near) if row["id"] in rephrased]
    if not complete:
        raise StudyError(f"no case is left in {stages.folder}: see the counts of each stage")
    cases = [
        Case(
            n,
            dataset.name,
            dataset.prompt(by_id[row["id"]][text]),
            by_id[row["id"]][target],
            (dataset.prompt(rephrased[row["id"]]),),
            tuple(dataset.prompt(by_id[one][text]) for one in row["neighbours"]),
        )
        for n, row in enumerate(complete)
    ]
    answers = {}
    if subject is not None:
        given = stages.run(
            "answers",
            {"subject": subject},
            [{"id": case.case_id} for case in cases],
            _answering(subject, cases),
            batch=32,
        )
        answers[subject] = [row["answers"] for row in sorted(given, key=lambda row: row["id"])]
    file = stages.folder / f"{published.layout_of(dataset).file}.json"
    published.write(file, cases, answers)
    return check_file(file)


def _answering(name: str, cases: Sequence[Case]) -> Callable[[Sequence[Row]], Iterator[Row]]:
    loaded: list = []

    def answer(rows: Sequence[Row]) -> Iterator[Row]:
        from ...evaluation.unedited import answers_for
        from ...subjects.subject import load_subject

        if not loaded:
            loaded.append(load_subject(name))
        for row in rows:
            yield {"id": row["id"], "answers": answers_for(loaded[0], cases[row["id"]].unrelated)}

    return answer
