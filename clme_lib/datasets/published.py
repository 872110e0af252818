"""CLMEEval as its authors publish it: their JSON layout, and the Zenodo record it comes from.

A file is a JSON list of records::

    {"case_id": 7,
     "edit_request": {"intent": ..., "snippet": ..., "rewritten_intent": ...},        CNLE
                     {"code": ..., "code_doc": ..., "code_rewrite": ...},             CSNE
     "neighborhoods": {"items": [{"intent": ...} x 5], "answers": {model: [5 strings]}}}

``answers`` may be missing: the study compares with the subject's own answers, generated in the dtype of the run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from ..support.cache import cache_dir
from ..support.errors import StudyError
from ..support.journal import write_text
from ..support.reading import read_json
from .base import Dataset, Layout, get_dataset
from .cases import MOST_CASE_ID, Case, checked_text
from .neighbours import NEIGHBOURS

ZENODO_RECORD = "12818365"
ZENODO_DOI = "10.5281/zenodo.12818365"


def read(path: str | os.PathLike, dataset: Dataset) -> list[Case]:
    """Read a file in the published layout.

    Raises:
        StudyError: the file cannot be read, or a record is malformed (the message names record and field).
    """
    cases: dict[int, Case] = {}
    for n, record in enumerate(read_records(path)):
        case = parse_record(record, f"{path}, record {n}", dataset)
        if cases.setdefault(case.case_id, case) is not case:
            raise StudyError(f"{path}: case_id {case.case_id} occurs twice")
    return list(cases.values())


def read_records(path: str | os.PathLike) -> list:
    """The unchecked records of a file in the published layout; StudyError if there are none."""
    records = read_json(os.fspath(path))
    if not isinstance(records, list) or not records:
        raise StudyError(
            f"{path}: expected a JSON list of records, found {type(records).__name__ if records else 'nothing'}"
        )
    return records


def layout_of(dataset: Dataset) -> Layout:
    """The authors' layout of a dataset; StudyError if the dataset is not theirs."""
    if dataset.layout is None:
        raise StudyError(
            f"dataset {dataset.name!r} has no layout of the paper's authors; use a JSON file that describes the dataset"
        )
    return dataset.layout


def file_in(folder: Path, dataset: Dataset) -> Path:
    """The dataset's file in a folder, named as the authors name it."""
    return folder / f"{layout_of(dataset).file}.json"


def parse_record(record: object, where: str, dataset: Dataset) -> Case:
    """A record of the published layout as a case; StudyError names the field that is wrong."""
    layout = layout_of(dataset)
    content = _object(record, where, ("case_id", "edit_request", "neighborhoods"))
    case_id = _field(content, "case_id", int, where)
    if not 0 <= case_id <= MOST_CASE_ID:
        raise StudyError(f"{where}: case_id {case_id} is not between 0 and {MOST_CASE_ID}")
    names = layout.text, layout.target, layout.rephrased
    request = _object(content["edit_request"], f"{where}, edit_request", names)
    text, target, rephrased = (_text(request, name, f"{where}, edit_request") for name in names)
    where = f"{where}, neighborhoods"
    neighbourhood = _object(content["neighborhoods"], where, ("items",), optional="answers")
    items = _field(neighbourhood, "items", list, where)
    if len(items) != NEIGHBOURS:
        raise StudyError(f"{where}: items has {len(items)} entries, expected {NEIGHBOURS}")
    places = [f"{where}, items[{n}]" for n in range(NEIGHBOURS)]
    unrelated = [_text(_object(item, place, (layout.text,)), layout.text, place) for item, place in zip(items, places)]
    answers = neighbourhood.get("answers") or {}
    lists = list(answers.values()) if isinstance(answers, dict) else [None]
    if not all(isinstance(texts, list) and [*map(type, texts)] == [str] * NEIGHBOURS for texts in lists):
        raise StudyError(f"{where}: answers must map each model to {NEIGHBOURS} strings")
    return Case.of(dataset, case_id, text, target, [rephrased], unrelated)


def _object(content: object, where: str, fields: tuple[str, ...], optional: str = "") -> dict[str, Any]:
    """An object with exactly these fields; an unknown field may be a misspelt one, and is refused."""
    if not isinstance(content, dict):
        raise StudyError(f"{where}: expected an object, found {type(content).__name__}")
    for name in fields:
        if name not in content:
            raise StudyError(f"{where}: field {name!r} is missing; found {', '.join(map(repr, content)) or 'none'}")
    if unknown := [name for name in content if name not in (*fields, optional)]:
        raise StudyError(f"{where}: unknown field {unknown[0]!r}; known: {', '.join(fields)}; remove or rename it")
    return content


def _field(content: dict[str, Any], name: str, kind: type, where: str) -> Any:
    if type(content[name]) is not kind:
        raise StudyError(f"{where}: field {name!r} is {type(content[name]).__name__}, expected {kind.__name__}")
    return content[name]


def _text(content: dict[str, Any], name: str, where: str) -> str:
    text = _field(content, name, str, where)
    try:
        return checked_text(text)
    except ValueError as error:
        raise StudyError(f"{where}: {name} {error}") from None


def write(path: str | os.PathLike, cases: list[Case], answers: dict[str, list[list[str]]] | None = None) -> None:
    """Write cases in the published layout, completely or not at all.

    Args:
        answers: by model, the continuations of every case's neighbours.
    """
    dataset = get_dataset(cases[0].dataset)
    layout = layout_of(dataset)
    records = [
        {
            "case_id": case.case_id,
            "edit_request": {
                layout.text: case.text,
                layout.target: case.target,
                layout.rephrased: dataset.text(case.rephrased[0]),
            },
            "neighborhoods": {"items": [{layout.text: dataset.text(prompt)} for prompt in case.unrelated],
                              "answers": {model: given[n] for model, given in (answers or {}).items()}},
        }
        for n, case in enumerate(cases)
    ]  # fmt: skip
    write_text(Path(path), json.dumps(records, indent=1))


def fetch(dataset: Dataset, api: str = "https://zenodo.org/api") -> Path:
    """Download the record's files into the cache (once) and return the dataset's ``all.json`` or named file.

    Every file is checked against the record's own MD5 before it gets its name in the cache.

    Raises:
        StudyError: no network, a checksum that does not match, or no file of this dataset in the record.
    """
    folder = cache_dir() / "clmeeval" / ZENODO_RECORD
    if not folder.is_dir():
        _download(folder, api)
    name = layout_of(dataset).file
    paths = {file: str(file.relative_to(folder)) for file in sorted(folder.rglob("*.json"))}
    files = [file for file, path in paths.items() if name.lower() in path.lower()]
    if not files:
        raise StudyError(
            f"record {ZENODO_DOI} in {folder}: no JSON file with a name like {name}; it has {list(paths.values())}"
        )
    # two-fold layout: <fold>/<dataset>/{train,test}.json beside one all.json
    return next((file for file in files if file.stem.lower() in ("all", name.lower())), files[0])


def _download(folder: Path, api: str) -> None:
    import requests

    advice = f"download it yourself from https://doi.org/{ZENODO_DOI} and pass the file's path as the source"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".clmeeval-") as scratch:
        unfinished = Path(scratch) / "files"
        unfinished.mkdir()
        try:
            answer = requests.get(f"{api}/records/{ZENODO_RECORD}", timeout=60)
            answer.raise_for_status()
            for entry in answer.json()["files"]:
                file = unfinished / Path(entry["key"]).name
                digest = hashlib.md5(usedforsecurity=False)
                with requests.get(entry["links"]["self"], stream=True, timeout=60) as body, file.open("wb") as out:
                    body.raise_for_status()
                    for chunk in body.iter_content(1 << 20):
                        digest.update(chunk)
                        out.write(chunk)
                if entry["checksum"].removeprefix("md5:") != digest.hexdigest():
                    raise StudyError(
                        f"{file.name} of {ZENODO_DOI}: the MD5 differs from the record's; try again or {advice}"
                    )
                if zipfile.is_zipfile(file):
                    with zipfile.ZipFile(file) as archive:
                        archive.extractall(unfinished / file.stem)  # members are kept inside the folder by zipfile
        except (requests.RequestException, KeyError, ValueError, OSError) as error:
            raise StudyError(f"could not download {ZENODO_DOI}: {error}; {advice}") from error
        shutil.move(unfinished, folder)
