"""Both datasets from their sources, stage by stage (paper section III-C).

::

                 CNLE                                            CSNE
    collect      intent and snippet of each mined pair           code without docstring and comments, first sentence
    score        relevance in five levels
    select       very relevant ones, each intent once            at most 256 tokens, each function and description once
    split        targeted and not, in seeded order               the test part targeted (without parts: as CNLE)
    neighbours   the five nearest that are not targeted          the same, after rephrasing
    rephrase     targeted intents in other words                 targeted functions with other names, verified
    answers      the subject's own continuations of the neighbours (only when a subject is named)

The result is a file in the published layout, and the findings of ``clme data check`` about it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from ...support.cache import file_sha256
from ...support.errors import StudyError
from ...support.seeds import seeded_order
from .. import published
from ..base import Dataset
from ..cases import Case
from ..neighbours import NEIGHBOURS, Embedder, nearest, tfidf
from ..paper import CNLE, CSNE, PAPER_DATASETS
from .checking import Report, check_file
from .relevance import LEVELS
from .rephrasing import GIVEN_INTENTS
from .sources import collect_functions, collect_pairs, source_files, too_long
from .stages import StageRow, Stages, Step, kept, manifest_of, read_stage, stage_row

MAX_TOKENS = 256
# a subject's name, and a function from prompts to its continuations
Answers = tuple[str, Callable[[Sequence[str]], list[str]]]
_FIELDS = {CNLE.name: ("intent", "snippet"), CSNE.name: ("code", "doc")}  # edit input and target


def build_cnle(
    folder: Path,
    source: str,
    scorer: Step,
    rephraser: Step,
    *,
    targets: int | None,
    seed: int,
    embed: Embedder = tfidf,
    answers: Answers | None = None,
) -> Report:
    """Build CNLE in ``folder``, or resume an interrupted build; returns the validation report of the file written.

    Args:
        source: ``embedded``, ``hub``, or a file or folder of CoNaLa rows.
        scorer: gives each pair its ``level``.
        rephraser: gives each targeted pair its ``rephrased`` intent.
        targets: maximum number of targeted intents (None: half of the selected ones).
        answers: the subject whose answers to the neighbours are written into the file, and a function that gives them.

    Raises:
        StudyError: a source or endpoint fails, a stage in the folder was made with different settings, or no rows are left.
    """
    work = _Construction(folder, CNLE, source, collect_pairs, embed)
    scores = work.run("score", scorer, work.collected)
    levels = {row["id"]: row["level"] for row in scores}

    def select(rows: Sequence[StageRow]) -> Iterator[StageRow]:
        unfit = [None if levels[row["id"]] == LEVELS[-1] else "not very relevant" for row in rows]
        return _distinct(rows, unfit, intent=[" ".join(row["intent"].split()).casefold() for row in rows])

    selected = work.run("select", Step({"level": LEVELS[-1]}, select, one_by_one=False), work.source_rows(scores))
    # without a language model, only rows that have a second wording can be targeted
    needs_wording = rephraser is GIVEN_INTENTS
    targeted, pool = work.split(selected, {"targets": targets, "seed": seed, "second wording": needs_wording})
    near = work.neighbours(targeted, pool)
    return work.finish(near, work.run("rephrase", rephraser, targeted), answers)


def build_csne(
    folder: Path,
    source: str,
    rephraser: Callable[[Sequence[str]], Step],
    *,
    targets: int | None,
    seed: int,
    embed: Embedder = tfidf,
    tokenizer: str | None = None,
    answers: Answers | None = None,
) -> Report:
    """Build CSNE in ``folder``; see :func:`build_cnle`.

    Args:
        source: ``embedded``, ``hub``, or a file or folder of CodeSearchNet rows.
        rephraser: made from the pool's functions; gives each targeted function its ``rephrased`` code.
        targets: maximum number of targeted functions (None: all of the test part).
        tokenizer: counts the tokens (the paper: CodeBERT's); None: the embedded subject's.
    """
    work = _Construction(folder, CSNE, source, collect_functions, embed)

    def select(rows: Sequence[StageRow]) -> Iterator[StageRow]:
        codes = [row["code"] for row in rows]
        unfit = ["too many tokens" if long else None for long in too_long(codes, MAX_TOKENS, tokenizer)]
        functions = [" ".join(code.split()) for code in codes]
        return _distinct(rows, unfit, function=functions, description=[row["doc"].casefold() for row in rows])

    settings = {"tokens": MAX_TOKENS, "tokenizer": tokenizer or "smollm2-135m"}
    selected = work.run("select", Step(settings, select, one_by_one=False), work.collected)
    targeted, pool = work.split(selected, {"targets": targets, "seed": seed})
    variants = work.run("rephrase", rephraser([row["code"] for row in pool]), targeted)
    near = work.neighbours(work.source_rows(variants), pool)
    return work.finish(near, variants, answers)


class _Construction:
    """The steps shared by both datasets. ``collected`` are the source's usable rows; ``rows`` maps ids to them."""

    def __init__(
        self,
        folder: Path,
        dataset: Dataset,
        source: str,
        collect: Callable[[str], Iterator[StageRow]],
        embed: Embedder,
    ) -> None:
        self.dataset, self.embed, self._stages = dataset, embed, Stages(folder)
        self.text, self.target = _FIELDS[dataset.name]
        known: Any = source  # its files with their hashes, so that a replaced source is noticed
        if source != "embedded":
            known = [[file.name, file_sha256(file)] for file in source_files(dataset, source)]
        step = Step({"dataset": dataset.name, "source": known}, lambda _: collect(source))
        self.collected = self.run("collect", step, [])
        self.rows = {row["id"]: row for row in self.collected}

    def run(self, name: str, step: Step, todo: Sequence[StageRow]) -> list[StageRow]:
        """The rows that a stage keeps."""
        return kept(self._stages.run(name, step, todo))

    def source_rows(self, rows: Iterable[StageRow]) -> list[StageRow]:
        """The source's rows with the same ids."""
        return [self.rows[row["id"]] for row in rows]

    def split(self, selected: Sequence[StageRow], settings: dict[str, Any]) -> tuple[list[StageRow], list[StageRow]]:
        """The targeted rows and the pool."""
        step = Step(settings, partial(_split, settings, self._stages.account()), one_by_one=False)
        split = self.run("split", step, self.source_rows(selected))
        targeted, pool = (self.source_rows(row for row in split if row["targeted"] == side) for side in (True, False))
        return targeted, pool

    def neighbours(self, targeted: Sequence[StageRow], pool: Sequence[StageRow]) -> list[StageRow]:
        """Each targeted row's nearest in the pool."""

        def make(rows: Sequence[StageRow]) -> Iterator[StageRow]:
            near = nearest(
                [row[self.text] for row in rows],
                [row[self.text] for row in pool],
                allowed=lambda row, entry: rows[row][self.target] != pool[entry][self.target],
                embed=self.embed,
            )
            for row, entries in zip(rows, near):
                few = {"dropped": "fewer than five neighbours"} if len(entries) < NEIGHBOURS else {}
                yield {"id": row["id"], "neighbours": [pool[n]["id"] for n in entries], **few}

        settings = getattr(self.embed, "settings", {"encoder": "tfidf"})
        return self.run("neighbours", Step(settings, make, fields={"neighbours": list}), targeted)

    def finish(self, near: Sequence[StageRow], rephrased: Sequence[StageRow], answers: Answers | None) -> Report:
        """Write the rows that have neighbours and a rephrased input as cases, and check them."""
        wordings = {row["id"]: row["rephrased"] for row in rephrased}
        complete = [row for row in near if row["id"] in wordings]
        if not complete:
            raise StudyError(
                f"no case is left in {self._stages.folder} ({self._stages.account()}): use a larger source"
            )
        cases = [
            Case.of(
                self.dataset,
                n,
                source[self.text],
                source[self.target],
                [wordings[source["id"]]],
                [self.rows[neighbour][self.text] for neighbour in row["neighbours"]],
            )
            for n, (row, source) in enumerate(zip(complete, self.source_rows(complete)))
        ]
        written = {}
        if answers is not None:
            subject, answer = answers
            step = Step(
                {"subject": subject},
                lambda rows: (stage_row(row["id"], answers=answer(cases[row["id"]].unrelated)) for row in rows),
                fields={"answers": list},
            )
            rows = self._stages.run("answers", step, [{"id": case.case_id} for case in cases])
            written[subject] = [row["answers"] for row in sorted(rows, key=lambda row: row["id"])]
        file = published.file_in(self._stages.folder, self.dataset)
        published.write(file, cases, written)
        return check_file(file)


def _distinct(rows: Sequence[StageRow], reasons: Iterable[str | None], **texts: Iterable[str]) -> Iterator[StageRow]:
    """Drop rows that have a reason, and rows of which an earlier row has one of the ``texts`` (by kind of text)."""
    known: set[tuple[str, str]] = set()
    for row, reason, *of_row in zip(rows, reasons, *texts.values()):
        named = list(zip(texts, of_row))
        repeated = [f"{what} occurs again" for what, text in named if (what, text) in known]
        reason = reason or next(iter(repeated), None)
        if reason is None:
            known.update(named)
        yield stage_row(row["id"], reason)


def _split(settings: dict[str, Any], account: str, rows: Sequence[StageRow]) -> Iterator[StageRow]:
    """Which rows are targeted: the source's test part if it has parts, else the first in seeded order.

    Raises:
        StudyError: too few rows are left to target or for the pool; the message has the ``account`` of the earlier stages.
    """
    by_id = {row["id"]: row for row in rows}
    order = seeded_order(by_id, "construction", settings["seed"])
    parts = {row.get("partition") for row in rows}
    by_part = "test" in parts and parts != {"test"}
    if by_part:
        candidates = [row_id for row_id in order if by_id[row_id]["partition"] == "test"]
    else:
        needs_wording = settings.get("second wording", False)
        candidates = [row_id for row_id in order if not needs_wording or by_id[row_id].get("rewritten_intent")]
    limit = settings["targets"] if by_part or settings["targets"] is not None else len(rows) // 2
    targeted = set(candidates[:limit])
    unused = set(candidates) - targeted if by_part else set()
    others = len(rows) - len(targeted) - len(unused)
    if not targeted or others < NEIGHBOURS:
        most = 0 if by_part else min(len(candidates), len(rows) - NEIGHBOURS)
        raise StudyError(
            f"{settings['targets'] or 'half'} of the rows were requested as targets; of the {len(rows)} that are left, {len(candidates)} can be "
            f"targeted, which leaves {others} for the pool; it needs at least {NEIGHBOURS} ({account}): "
            + (f"give --targets {most} or fewer" if most > 0 else "use a larger source")
            + ("" if candidates or by_part else ", or name a --model: no row has a second wording (rewritten_intent)")
        )
    for row_id in order:
        dropped = {"dropped": "of the test part, not needed"} if row_id in unused else {}
        yield {"id": row_id, "targeted": row_id in targeted, **dropped}


def stage_rows(folder: Path, name: str, *fields: str) -> list[StageRow]:
    """The rows of a finished stage; StudyError if the folder has none, or they lack a field (as another dataset's rows do)."""
    files = sorted(folder.glob(f"[0-9][0-9]-{name}.jsonl"))
    rows = read_stage(files[0]) if files else []
    if not rows:
        raise StudyError(f"{folder}: no stage {name!r}; build the dataset first: clme data build ... --out {folder}")
    for what in fields:
        if any(what not in row for row in kept(rows)):
            raise StudyError(f"{files[0]}: rows have no {what!r}: is this stage of another dataset?")
    return rows


def built_cases(folder: Path) -> list[Case]:
    """The cases of a dataset that was built in ``folder``; StudyError if there is none or its file is damaged."""
    for dataset in PAPER_DATASETS:
        if (file := published.file_in(folder, dataset)).is_file():
            return published.read(file, dataset)
    raise StudyError(f"{folder}: no dataset; build it first: clme data build ... --out {folder}")


def level_counts(folder: Path) -> pd.DataFrame:
    """Table II: how many pairs the scorer gave each level."""
    rows = stage_rows(folder, "score")
    counts = Counter(row.get("level", row.get("dropped")) for row in rows)
    names = [*LEVELS[::-1], *(name for name in counts if name not in LEVELS)]
    return pd.DataFrame([{"level": name, "pairs": counts[name], "share": counts[name] / len(rows)} for name in names])


def stage_counts(folder: Path) -> pd.DataFrame:
    """What each stage of a construction kept and dropped, by reason."""
    manifests = map(manifest_of, sorted(folder.glob("[0-9][0-9]-*.json")))
    counts = [(made["stage"], what, count) for made in manifests for what, count in made["counts"].items()]
    return pd.DataFrame(counts, columns=["stage", "what", "count"])
