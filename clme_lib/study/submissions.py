"""Results that others send in: a run is checked, a sample of it edited again, and copied into a folder that a pull request adds.

The folder is a published run (copies.py) with a ``submission.json`` that says whose it is and what was checked. The same checks, but for the editing, are made of
every folder of ``results/submissions/`` by the tests, so that what a pull request changes by hand is noticed.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ..editors.registry import get_editor
from ..evaluation.evaluate import SINGLE
from ..evaluation.records import UNKNOWN
from ..support.errors import StudyError
from ..support.journal import write_text
from ..support.reading import read_json
from ..support.schema import Schema, parse
from . import provenance, spot_check
from .config import SubmitConfig, make_config
from .copies import publish
from .paper import UNEDITED
from .run_folder import check_cases, load_manifest, load_run
from .runs import run

FILE = "submission.json"
LEAST_CASES = 20


class Checked(Schema):
    """The sample that was edited again on the submitter's machine: when, where, how many cases and greedy texts, and how many came out the same."""

    at: str
    hardware: str
    cases: int = Field(ge=1)
    greedy: int = Field(ge=1)
    greedy_same: int = Field(ge=0)


class Submission(Schema):
    """What ``submission.json`` says beside the records."""

    schema_version: Literal[1] = 1
    authors: Annotated[str, Field(min_length=1, max_length=500)]
    about: Annotated[str, Field(min_length=1, max_length=2000)]
    url: str | None = Field(None, pattern=r"^https://\S+$", max_length=500)
    packages: dict[str, str]  # of each editor the package that has it, and its version
    checked: Checked


def submit(config: SubmitConfig) -> Submission:
    """Check a run, edit a sample of it again, and write it to ``config.target``.

    Raises:
        StudyError: something is missing, cannot be proved, or does not come out the same; nothing is written then.
    """
    if config.target.exists():
        raise StudyError(f"{config.target} already exists: choose another name or remove it")
    manifest = load_manifest(config.run)
    if manifest["config"]["source"] not in ("embedded", "published"):
        raise StudyError(
            f"{config.run}: its cases come from {manifest['config']['source']}, which others do not have; use embedded or published cases"
        )
    config.target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.target.parent, prefix=".submission-") as folder:
        copy = Path(folder, config.target.name)
        publish(config.run, copy)
        check_records(copy)
        checked = _edit_again(copy, manifest["config"], config.check_cases, Path(folder))
        submission = Submission(
            authors=config.authors, about=config.about, url=config.url, packages=_packages(copy), checked=checked
        )
        write_text(copy / FILE, submission.model_dump_json(indent=1) + "\n")
        shutil.move(copy, config.target)
    return submission


def load_submission(folder: Path) -> Submission:
    """A submission whose records pass :func:`check_records`.

    Raises:
        StudyError: a file is missing, damaged, or its records do not pass.
    """
    file = folder / FILE
    if not file.is_file():
        raise StudyError(f"{folder}: {FILE} is missing; `clme submit` writes it")
    submission = parse(Submission, read_json(file), str(file))
    check_records(folder)
    editors = set(load_run(folder)["editor"])
    if strange := editors ^ set(submission.packages):
        raise StudyError(f"{file}: packages: {', '.join(sorted(strange))} must be both in the records and in the list")
    if submission.checked.greedy_same < spot_check.GREEDY_AGREEMENT * submission.checked.greedy:
        raise StudyError(
            f"{file}: checked: only {submission.checked.greedy_same} of {submission.checked.greedy} texts were reproduced, which is too few"
        )
    return submission


def check_records(folder: Path) -> None:
    """What can be checked of a published run without a model: that its cases are those of this study, that it says what made each record, and that it can be compared.

    Raises:
        StudyError: it is not so.
    """
    check_cases(folder)
    records, starts = load_run(folder), {start["id"] for start in load_manifest(folder)["starts"]}
    if len(unknown := records[records["commit"].str.startswith(UNKNOWN) | ~records["start"].isin(starts)]):
        row = unknown.iloc[0]
        raise StudyError(
            f"{folder}: case {row['case_id']} by {row['editor']}: the record does not say what made it; run the case again with a library that is in a git repository"
        )
    if len(changed := records[records["commit"].str.endswith("+changes")]):
        raise StudyError(
            f"{folder}: case {changed.iloc[0]['case_id']} was made by a library with uncommitted changes; commit them and run the case again"
        )
    if (records["protocol"] == SINGLE).all():
        for dataset, rows in records.groupby("dataset"):
            by_editor = {str(editor): set(of_editor["case_id"]) for editor, of_editor in rows.groupby("editor")}
            for editor, ids in by_editor.items():
                if len(ids) < LEAST_CASES:
                    raise StudyError(
                        f"{folder}: {len(ids)} cases of {dataset} by {editor}; at least {LEAST_CASES} are needed"
                    )
                if missing := ids - by_editor.get(UNEDITED, set()):
                    raise StudyError(
                        f"{folder}: {dataset} case {min(missing)} by {editor} has no unedited record to compare with; add the editor {UNEDITED}"
                    )


def _edit_again(copy: Path, fields: dict, cases: int, folder: Path) -> Checked:
    """A few of the cases that all editors have, on this machine, compared text by text."""
    records = load_run(copy)
    # What a model of many edits writes depends on the edits it holds: the first few of the same order are made again.
    single = (records["protocol"] == SINGLE).all()
    (sample,) = {start["sample"] for start in load_manifest(copy)["starts"]} if not single else {1}
    again = {
        **fields,
        "editors": sorted(set(records["editor"])),
        "cases": cases,
        "held_out": 0,
        "sample": sample,
        "within": copy if single else fields["within"],
        "out": folder / "again",
        "accept": None,
    }
    config = make_config(**again)
    comparison = spot_check.compare(run(config), load_run(copy))
    if not comparison.passed:
        raise StudyError(f"the sample was not reproduced:\n{spot_check.describe(comparison)}")
    counts = comparison.table[["cases", "greedy", "greedy_same"]].sum()
    (start,) = load_manifest(config.out)["starts"]
    return Checked(
        at=provenance.now(),
        hardware=str(start["hardware"]["name"]),
        **{name: int(count) for name, count in counts.items()},
    )


def _packages(copy: Path) -> dict[str, str]:
    """By editor, the installed package that registers it, or the library."""
    points = importlib.metadata.entry_points(group="clme_lib.editors")
    by_module = {point.value.partition(":")[0].partition(".")[0]: point.dist for point in points if point.dist}
    packages = {}
    for editor in sorted(set(load_run(copy)["editor"])):
        distribution = by_module.get(get_editor(editor).__module__.partition(".")[0])
        packages[editor] = (
            f"{distribution.name} {distribution.version}"
            if distribution
            else f"clme {provenance.library_sha256()[:10]}"
        )
    return packages
