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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...support.errors import StudyError, first_line
from .. import embedded_cnle, embedded_csne, mining
from ..base import DataSet
from ..paper import CNLE, CSNE
from ..source_code import first_sentence, parsed, single_function, without_comments, without_docstring
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
                yield from _objects(json.loads(stream.read().decode("utf-8-sig")), path)
                return
            for line in io.TextIOWrapper(stream, encoding="utf-8-sig", newline=None):
                number += 1
                if line.strip():
                    yield from _objects([json.loads(line)], path)
    except (OSError, EOFError, zlib.error) as error:
        raise StudyError(f"{path}: cannot be read after line {number}: {error}; is the download complete?") from error
    except UnicodeDecodeError as error:
        raise StudyError(f"{path}: not UTF-8 after line {number} ({error.reason}); convert it") from error
    except ValueError as error:
        raise StudyError(f"{path}, line {max(number, 1)}: not JSON: {error}") from error


def _objects(rows: Any, path: Path) -> Iterator[dict[str, Any]]:
    for row in rows:
        if not isinstance(row, dict):
            raise StudyError(f"{path}: a row is {type(row).__name__}, expected an object")
        yield row


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
        rows: Iterator[dict] = iter([*embedded_cnle.read_rows("cnle-targets"), *embedded_cnle.read_rows("cnle-pool")])
    else:
        rows = (row for file in source_files(CNLE, source) for row in read_table(file))
    for number, row in enumerate(rows):
        texts = {name: _clean(row.get(name)) for name in ("intent", "snippet", "rewritten_intent")}
        reason = next((f"no {name}" for name in ("intent", "snippet") if not texts[name]), None)
        if reason is None and max(map(len, texts.values())) > LONGEST:
            reason = "too long"
        yield stage_row(number, reason, **texts)


def collect_functions(source: str) -> Iterator[StageRow]:
    """CodeSearchNet's functions: ``id``, ``code`` without docstring and comments, ``doc``, ``partition`` and ``package``."""
    if source == "embedded":
        content = embedded_csne.load_content()
        rows = [(row, part) for key, part in (("targets", "test"), ("pool", "train")) for row in content[key]]
        for row, part in rows:
            yield stage_row(row["origin"], code=row["code"], doc=row["doc"], partition=part, package=row["package"])
        return
    number = -1
    for file in source_files(CSNE, source):
        parts = "train", "valid", "test"
        # the hub's conversion has a folder for each part
        named = next((part for part in parts if part in file.stem or part == file.parent.name), None)
        for row in read_table(file):
            number += 1
            yield _function(number, row, row.get("partition") or row.get("split_name") or named)


def _function(number: int, row: dict, partition: str | None) -> StageRow:
    # the Hub's columns, then those of the jsonl files
    code, doc = (next((text for name in names if (text := _clean(row.get(name)))), "")
                 for names in (("func_code_string", "code"), ("func_documentation_string", "docstring", "doc")))  # fmt: skip
    if not code or not doc:
        return stage_row(number, f"no {'docstring' if code else 'code'}")
    if len(code) > LONGEST:
        return stage_row(number, "too long")
    bare, sentence = bare_function(code), first_sentence(doc)
    if bare is None or sentence is None:
        return stage_row(number, "no describing sentence" if bare else "not one Python 3 function")
    package = str(row.get("repository_name") or row.get("repo") or "")
    return stage_row(number, code=bare, doc=sentence, partition=partition, package=package)


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
    bare = without_docstring(text.split("\n"), functions[text])
    bare = without_comments(bare) if bare else None
    bare = "\n".join(line.rstrip() for line in bare.split("\n")).strip("\n") if bare else None
    return bare if bare and parsed(bare) else None


def _clean(value: Any) -> str:
    """Text with line feeds alone, without white space around it; nothing for what is no text."""
    return value.replace("\r\n", "\n").strip() if isinstance(value, str) else ""


def too_long(texts: Sequence[str], limit: int, tokenizer: str | None) -> Iterator[bool]:
    """Which texts have more than ``limit`` tokens: of a Hugging Face tokenizer (the paper: CodeBERT's), or of the embedded subject's."""
    if tokenizer is None:
        encoder = mining.tokenizer()
    else:
        from transformers import AutoTokenizer

        try:
            loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise StudyError(f"tokenizer {tokenizer!r} could not be loaded: {first_line(error)}") from error
    for first in range(0, len(texts), _TOKENIZED):  # an encoding takes many times the memory of its text
        part = list(texts[first : first + _TOKENIZED])
        if tokenizer is None:
            yield from (len(encoding.ids) > limit for encoding in encoder.encode_batch(part, add_special_tokens=False))
        else:
            yield from (len(ids) > limit for ids in loaded(part, add_special_tokens=True)["input_ids"])
