"""Reading the datasets' sources: CoNaLa and CodeSearchNet, from the Hub, from files, or from the embedded stand-ins.

Files are JSON (a list), JSON Lines (also gzipped) or Parquet. An unusable row is dropped with a reason, which the
stage's counts show; an unreadable file is an error that names it.
"""

from __future__ import annotations

import ast
import gzip
import io
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...subjects import embedded as embedded_subject
from ...support.errors import StudyError, first_line
from ...support.reading import parse_json
from .. import embedded_cnle, embedded_csne
from ..base import Dataset
from ..paper import CNLE, CSNE
from ..source_code import bare_code, first_sentence, single_function, source_lines
from .stages import StageRow, stage_row

# dataset -> (Hub repository, files of the part that the paper uses)
HUB = {
    CNLE.name: ("codeparrot/conala-mined-curated", "**.parquet"),
    CSNE.name: ("code-search-net/code_search_net", "python/**.parquet"),
}
_TOKENIZED = 1_000  # texts at a time
LONGEST = 100_000  # characters; longer code cannot have just 256 tokens, and may take minutes to parse


def read_table(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSON, JSON Lines (``.gz``) or Parquet file.

    Raises:
        StudyError: the file cannot be read; the message names the line.
    """
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet
        from pyarrow import ArrowException

        try:
            for batch in parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
        except (OSError, ArrowException, ValueError, OverflowError) as error:
            raise StudyError(
                f"{path}: cannot be read as Parquet: {first_line(error)}; is the download complete?"
            ) from error
        return
    number = 0  # of the last line that was read
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            first = stream.peek(64)[:64].lstrip(b"\xef\xbb\xbf \r\n\t")
            if first.startswith(b"["):
                for place, row in enumerate(parse_json(stream.read(), str(path))):
                    yield _object(f"{path}, row {place}", row)
                return
            for line in io.TextIOWrapper(stream, encoding="utf-8-sig", newline=None):
                number += 1
                if line.strip():
                    yield _object(where := f"{path}, line {number}", parse_json(line, where))
    except (OSError, EOFError, zlib.error) as error:
        raise StudyError(f"{path}: cannot be read after line {number}: {error}; is the download complete?") from error
    except UnicodeDecodeError as error:
        raise StudyError(f"{path}: not UTF-8 after line {number} ({error.reason}); convert it") from error


def _object(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise StudyError(f"{where}: expected an object, found {type(row).__name__}")
    return row


def hub_files(dataset: Dataset) -> list[Path]:
    """The dataset's source files, downloaded to the Hugging Face cache.

    The Hub stores most datasets as Parquet, and converts the others on a separate branch, which is used if the repository
    itself has no such file.
    """
    from huggingface_hub import snapshot_download

    repository, pattern = HUB[dataset.name]
    try:
        for revision in (None, "refs/convert/parquet"):
            folder = snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=[pattern])
            if files := sorted(file for file in Path(folder).rglob("*.parquet") if file.is_file()):
                return files
    except Exception as error:  # the hub's errors have no common type
        raise StudyError(
            f"{repository} could not be downloaded: {first_line(error)}; download its files yourself and pass them with --source"
        ) from error
    raise StudyError(f"{repository} has no files like {pattern}; download its files and pass them with --source")


def source_files(dataset: Dataset, source: str) -> list[Path]:
    """The files of ``source``: ``hub``, a file, or a folder of files."""
    if source == "hub":
        return hub_files(dataset)
    path = Path(source)
    try:
        files = [path / name for name in sorted(os.listdir(path))] if os.path.isdir(path) else [path]
    except OSError as error:
        raise StudyError(f"source {source!r} cannot be read: {error}") from error
    files = [file for file in files if file.suffix in (".json", ".jsonl", ".gz", ".parquet")]
    if not files or not all(map(os.path.isfile, files)):
        raise StudyError(
            f"source {source!r} is not hub, embedded, a JSON, JSON Lines, gzip or Parquet file, or a folder of such files"
        )
    return files


def collect_pairs(source: str) -> Iterator[StageRow]:
    """CoNaLa's pairs: ``id``, ``intent``, ``snippet``, and ``rewritten_intent`` where there is one."""
    if source == "embedded":
        rows: Iterable[dict] = [*embedded_cnle.read_rows("cnle-targets"), *embedded_cnle.read_rows("cnle-pool")]
    else:
        rows = (row for file in source_files(CNLE, source) for row in read_table(file))
    number = -1
    for number, row in enumerate(rows):
        texts = {name: _text(row, name) for name in ("intent", "snippet", "rewritten_intent")}
        reason = next((f"no {name}" for name in ("intent", "snippet") if not texts[name]), None)
        if reason is None and max(map(len, texts.values())) > LONGEST:
            reason = "too long"
        yield stage_row(number, reason, **texts)
    if number < 0:
        raise StudyError(f"source {source!r} has no rows")


def collect_functions(source: str) -> Iterator[StageRow]:
    """CodeSearchNet's functions: ``id``, ``code`` without docstring and comments, ``doc``, ``partition`` and ``package``."""
    if source == "embedded":
        content = embedded_csne.load_content()
        for key, part in (("targets", "test"), ("pool", "train")):
            for row in content[key]:
                yield stage_row(row["origin"], code=row["code"], doc=row["doc"], partition=part, package=row["package"])
        return
    rows = ((file, row) for file in source_files(CSNE, source) for row in read_table(file))
    number = -1
    for number, (file, row) in enumerate(rows):
        # the Hub's columns, then those of the jsonl files
        code = _text(row, "func_code_string", "code")
        doc = _text(row, "func_documentation_string", "docstring", "doc")
        bare, sentence, reason = None, None, None
        if not code or not doc:
            reason = f"no {'docstring' if code else 'code'}"
        elif len(code) > LONGEST:
            reason = "too long"
        elif (bare := bare_function(code)) is None:
            reason = "not one Python 3 function"
        elif (sentence := first_sentence(doc)) is None:
            reason = "no describing sentence"
        # the hub's conversion has a folder for each part
        named = (part for part in ("train", "valid", "test") if part in file.stem or part == file.parent.name)
        partition = _text(row, "partition", "split_name") or next(named, None)
        package = _text(row, "repository_name", "repo")
        yield stage_row(number, reason, code=bare, doc=sentence, partition=partition, package=package)
    if number < 0:
        raise StudyError(f"source {source!r} has no rows")


def bare_function(code: str) -> str | None:
    """A function's source without docstring, comments and decorators; None when it is not one function of Python 3."""
    code = "\n".join(source_lines(code)).strip()
    # CodeSearchNet strips the indentation of a method's first line but not of the others
    first, *rest = code.split("\n")
    least = min((len(line) - len(line.lstrip()) for line in rest if line.strip()), default=4)
    outdented = "\n".join([first, *(line[max(0, least - 4) :] for line in rest)])
    function, moved = single_function(code), single_function(outdented)
    if function is None:
        return None
    if moved is None or ast.dump(moved) != ast.dump(function):  # dedenting changed the text of a string
        moved, outdented = function, code
    return bare_code(source_lines(outdented), moved)


def _text(row: dict[str, Any], *names: str) -> str:
    """The first of the fields that is text, stripped and with only line feeds as line ends; else an empty text."""
    texts = (row[name].replace("\r\n", "\n").strip() for name in names if isinstance(row.get(name), str))
    return next(filter(None, texts), "")


def too_long(texts: Sequence[str], limit: int, tokenizer: str | None) -> Iterator[bool]:
    """Whether each text has more than ``limit`` tokens, by a Hugging Face tokenizer (the paper: CodeBERT's) or the embedded subject's."""
    from transformers import AutoTokenizer

    try:
        encode = AutoTokenizer.from_pretrained(tokenizer or str(embedded_subject.ensure()), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise StudyError(f"tokenizer {tokenizer!r} could not be loaded: {first_line(error)}") from error
    for first in range(0, len(texts), _TOKENIZED):  # an encoding takes many times its text's memory
        yield from (len(ids) > limit for ids in encode(list(texts[first : first + _TOKENIZED]))["input_ids"])
