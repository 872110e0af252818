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

from ..support.cache import cache_dir
from ..support.errors import StudyError
from .base import DataSet, Layout, get_dataset
from .cases import Case
from .neighbours import NEIGHBOURS

ZENODO_RECORD = "12818365"
ZENODO_DOI = "10.5281/zenodo.12818365"


def read(path: str | os.PathLike, dataset: DataSet) -> list[Case]:
    """Read a file in the published layout.

    Raises:
        StudyError: the file cannot be read, or a record is malformed (the message names record and field).
    """
    records = read_records(path)
    cases = [parse_record(record, f"{path}, record {n}", dataset) for n, record in enumerate(records)]
    ids: set[int] = set()
    for case in cases:
        if case.case_id in ids:
            raise StudyError(f"{path}: case_id {case.case_id} occurs twice")
        ids.add(case.case_id)
    return cases


def read_records(path: str | os.PathLike) -> list:
    """The records of a file in the published layout, not looked into.

    Raises:
        StudyError: it cannot be read, or is not a list of records.
    """
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise StudyError(f"{path}: cannot be read as UTF-8 JSON: {error}") from error
    if not isinstance(records, list) or not records:
        raise StudyError(f"{path}: expected a JSON list of records, found {type(records).__name__} of no records")
    return records


def layout_of(dataset: DataSet) -> Layout:
    """The authors' layout of a data set.

    Raises:
        StudyError: it is not one of theirs.
    """
    if dataset.layout is None:
        raise StudyError(
            f"data set {dataset.name!r} has no layout of the paper's authors; give it a file that describes itself"
        )
    return dataset.layout


def parse_record(record: object, where: str, dataset: DataSet) -> Case:
    """A record of the published layout as a case; StudyError names the field that is wrong."""
    layout = layout_of(dataset)
    request_fields = (layout.text, layout.target, layout.rephrased)
    case_id = _field(record, "case_id", int, where)
    request = _field(record, "edit_request", dict, where)
    texts = [_field(request, name, str, f"{where}, edit_request") for name in request_fields]
    for name, text in zip(request_fields, texts):
        if not text.strip():
            raise StudyError(f"{where}, edit_request: {name} is empty")
    neighbourhood = _field(record, "neighborhoods", dict, where)
    items = _field(neighbourhood, "items", list, f"{where}, neighborhoods")
    if len(items) != NEIGHBOURS:
        raise StudyError(f"{where}, neighborhoods: items has {len(items)} entries, expected {NEIGHBOURS}")
    answers = neighbourhood.get("answers") or {}
    if not isinstance(answers, dict) or any(len(given) != NEIGHBOURS for given in answers.values()):
        raise StudyError(f"{where}, neighborhoods: answers must map each model to {NEIGHBOURS} strings")
    unrelated = [_field(item, layout.text, str, f"{where}, neighborhoods, items[{n}]") for n, item in enumerate(items)]
    return Case(
        case_id,
        dataset.name,
        dataset.prompt(texts[0]),
        texts[1],
        (dataset.prompt(texts[2]),),
        tuple(map(dataset.prompt, unrelated)),
    )


def _field(record: object, name: str, kind: type, where: str):
    if not isinstance(record, dict):
        raise StudyError(f"{where}: expected an object, found {type(record).__name__}")
    if name not in record:
        raise StudyError(f"{where}: field {name!r} is missing; found {', '.join(map(repr, record)) or 'none'}")
    if not isinstance(record[name], kind) or isinstance(record[name], bool):
        raise StudyError(f"{where}: field {name!r} is {type(record[name]).__name__}, expected {kind.__name__}")
    return record[name]


def write(path: str | os.PathLike, cases: list[Case], answers: dict[str, list[list[str]]] | None = None) -> None:
    """Write cases in the published layout, whole or not at all.

    Args:
        answers: of each model, the continuations of every case's neighbours.
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
    unfinished = Path(f"{path}.part")
    unfinished.write_text(json.dumps(records, indent=1), encoding="utf-8")
    os.replace(unfinished, path)


def fetch(dataset: DataSet, api: str = "https://zenodo.org/api") -> Path:
    """Download the record's files into the cache (once) and return the data set's ``all.json`` or named file.

    Every file is checked against the record's own MD5 before it gets its name in the cache.

    Raises:
        StudyError: no network, a checksum that does not match, or no file of this data set in the record.
    """
    folder = cache_dir() / "clmeeval" / ZENODO_RECORD
    if not folder.is_dir():
        _download(folder, api)
    stem = layout_of(dataset).file.lower()
    files = [file for file in sorted(folder.rglob("*.json")) if stem in str(file.relative_to(folder)).lower()]
    # two-fold layout: <fold>/<data set>/{train,test}.json beside one all.json
    whole = [file for file in files if file.stem.lower() in ("all", stem)] or files
    if not whole:
        names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.json"))
        raise StudyError(
            f"record {ZENODO_DOI} in {folder}: no JSON file named like {layout_of(dataset).file}; it has {names}"
        )
    return whole[0]


def _download(folder: Path, api: str) -> None:
    import requests

    advice = f"get it by hand from https://doi.org/{ZENODO_DOI} and pass the file's path as the source"
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
                with (
                    requests.get(entry["links"]["self"], stream=True, timeout=60) as body,
                    file.open("wb") as out,
                ):
                    body.raise_for_status()
                    for chunk in body.iter_content(1 << 20):
                        digest.update(chunk)
                        out.write(chunk)
                if entry["checksum"].removeprefix("md5:") != digest.hexdigest():
                    raise StudyError(
                        f"{file.name} of {ZENODO_DOI}: MD5 differs from the record's; try again or {advice}"
                    )
                if zipfile.is_zipfile(file):
                    with zipfile.ZipFile(file) as archive:
                        archive.extractall(unfinished / file.stem)  # members are kept inside the folder by zipfile
        except (requests.RequestException, KeyError, ValueError, OSError) as error:
            raise StudyError(f"could not download {ZENODO_DOI}: {error}; {advice}") from error
        shutil.move(unfinished, folder)
