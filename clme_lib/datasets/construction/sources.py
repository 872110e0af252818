"""Reading what the data sets are made from: CoNaLa and CodeSearchNet, from the Hub, files or the embedded stand-ins.

Files are JSON (a list), JSON Lines (also gzipped) or Parquet. A row that cannot be used is dropped with its reason, which the
stage's counts show; a file that cannot be read is an error that names it.
"""

from __future__ import annotations

import ast
import gzip
import io
import json
import textwrap
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...subjects import embedded as embedded_subject
from ...support.errors import StudyError, first_line
from .. import embedded_cnle, embedded_csne
from ..base import DataSet
from ..paper import CNLE, CSNE
from ..source_code import bare_code, first_sentence, parsed, single_function
from .stages import StageRow, stage_row

# data set -> (Hub repository, files of the part that the paper uses)
HUB = {
    CNLE.name: ("codeparrot/conala-mined-curated", "**.parquet"),
    CSNE.name: ("code-search-net/code_search_net", "python/**.parquet"),
}
_TOKENIZED = 1_000  # texts at a time
LONGEST = 100_000  # characters; nothing longer can have 256 tokens, and parsing it may take minutes


def read_table(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSON, JSON Lines (``.gz``) or Parquet file.

    Raises:
        StudyError: it cannot be read; the message has the line.
    """
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet
        from pyarrow import ArrowException

        try:
            for batch in parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
        except (OSError, ArrowException) as error:
            raise StudyError(f"{path}: cannot be read as Parquet: {error}") from error
        return
    number = 0  # of the last line that was read
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            first = stream.peek(64)[:64].lstrip(b"\xef\xbb\xbf \r\n\t")
            if first.startswith(b"["):
                yield from (_object(path, row) for row in json.loads(stream.read().decode("utf-8-sig")))
                return
            for line in io.TextIOWrapper(stream, encoding="utf-8-sig", newline=None):
                number += 1
                if line.strip():
                    yield _object(path, json.loads(line))
    except (OSError, EOFError, zlib.error) as error:
        raise StudyError(f"{path}: cannot be read after line {number}: {error}; is the download complete?") from error
    except UnicodeDecodeError as error:
        raise StudyError(f"{path}: not UTF-8 after line {number} ({error.reason}); convert it") from error
    except ValueError as error:
        raise StudyError(f"{path}, line {max(number, 1)}: not JSON: {error}") from error


def _object(path: Path, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise StudyError(f"{path}: a row is {type(row).__name__}, expected an object")
    return row


def hub_files(dataset: DataSet) -> list[Path]:
    """The data set's source files, downloaded to the Hugging Face cache.

    The Hub keeps most data sets as Parquet, and converts the others on a branch of its own, which is asked when the repository
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
            f"{repository} could not be downloaded: {first_line(error)}; get its files by hand and pass them with --source"
        ) from error
    raise StudyError(f"{repository} has no files like {pattern}; get its files by hand and pass them with --source")


def source_files(dataset: DataSet, source: str) -> list[Path]:
    """The files of ``source``: ``hub``, a file, or a folder of files."""
    if source == "hub":
        return hub_files(dataset)
    path = Path(source)
    files = sorted(path.glob("*")) if path.is_dir() else [path]
    files = [file for file in files if file.suffix in (".json", ".jsonl", ".gz", ".parquet")]
    if not files or not all(file.is_file() for file in files):
        raise StudyError(
            f"source {source!r} is neither hub, embedded, nor a JSON, JSON Lines, gzip or Parquet file or a folder of them"
        )
    return files


def collect_pairs(source: str) -> Iterator[StageRow]:
    """CoNaLa's pairs: ``id``, ``intent``, ``snippet``, and ``rewritten_intent`` where there is one."""
    if source == "embedded":
        rows: Iterable[dict] = [*embedded_cnle.read_rows("cnle-targets"), *embedded_cnle.read_rows("cnle-pool")]
    else:
        rows = (row for file in source_files(CNLE, source) for row in read_table(file))
    for number, row in enumerate(rows):
        texts = {name: _text(row, name) for name in ("intent", "snippet", "rewritten_intent")}
        reason = next((f"no {name}" for name in ("intent", "snippet") if not texts[name]), None)
        if reason is None and max(map(len, texts.values())) > LONGEST:
            reason = "too long"
        yield stage_row(number, reason, **texts)


def collect_functions(source: str) -> Iterator[StageRow]:
    """CodeSearchNet's functions: ``id``, ``code`` without docstring and comments, ``doc``, ``partition`` and ``package``."""
    if source == "embedded":
        content = embedded_csne.load_content()
        for key, part in (("targets", "test"), ("pool", "train")):
            for row in content[key]:
                yield stage_row(row["origin"], code=row["code"], doc=row["doc"], partition=part, package=row["package"])
        return
    rows = ((file, row) for file in source_files(CSNE, source) for row in read_table(file))
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
        partition = row.get("partition") or row.get("split_name") or next(named, None)
        package = str(row.get("repository_name") or row.get("repo") or "")
        yield stage_row(number, reason, code=bare, doc=sentence, partition=partition, package=package)


def bare_function(code: str) -> str | None:
    """A function's source without docstring, comments and decorators; None when it is not one function of Python 3."""
    code = textwrap.dedent(code.replace("\r\n", "\n").expandtabs(4))
    if not code.startswith(("def ", "async def ", "@")):
        code = code.lstrip()
    # CodeSearchNet strips a method's first line of its indentation and leaves the rest theirs
    first, _, rest = code.partition("\n")
    lines = rest.split("\n")
    least = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=4)
    outdented = "\n".join([first, *(line[max(0, least - 4) :] for line in lines)])
    functions = {text: function for text in (code, outdented) if (function := single_function(text))}
    if not functions:
        return None
    # moving the lines must not have moved the text of a string
    same = len(functions) == 1 or ast.dump(functions[code]) == ast.dump(functions[outdented])
    text = outdented if same and outdented in functions else code
    lines = (bare_code(text.split("\n"), functions[text]) or "").split("\n")
    bare = "\n".join(line.rstrip() for line in lines).strip("\n")
    return bare if bare and parsed(bare) else None


def _text(row: dict[str, Any], *names: str) -> str:
    """The first of the fields that is a text, with line feeds alone and without white space around it; else an empty one."""
    texts = (row[name].replace("\r\n", "\n").strip() for name in names if isinstance(row.get(name), str))
    return next(filter(None, texts), "")


def too_long(texts: Sequence[str], limit: int, tokenizer: str | None) -> Iterator[bool]:
    """Which texts have more than ``limit`` tokens: of a Hugging Face tokenizer (the paper: CodeBERT's), or of the embedded subject's."""
    from transformers import AutoTokenizer

    try:
        encode = AutoTokenizer.from_pretrained(tokenizer or str(embedded_subject.ensure()), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise StudyError(f"tokenizer {tokenizer!r} could not be loaded: {first_line(error)}") from error
    for first in range(0, len(texts), _TOKENIZED):  # an encoding takes many times the memory of its text
        yield from (len(ids) > limit for ids in encode(list(texts[first : first + _TOKENIZED]))["input_ids"])
