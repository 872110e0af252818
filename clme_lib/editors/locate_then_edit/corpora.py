"""Texts to gather statistics from: the embedded mined functions, the user's files, or a dataset on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...support.errors import StudyError
from ...support.seeds import seeded_order

SEED = 1  # seed of the order in which documents are drawn
WIKIPEDIA = "hub:wikimedia/wikipedia/20231101.en"
_TEXT_FILES = (".txt", ".md", ".rst", ".py")


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed random order, with the requested ``name`` and a hash or revision of the content; ``documents()``
    starts over from the first."""

    name: str
    identity: str
    documents: Callable[[], Iterator[str]]


def open_corpus(name: str) -> Corpus:
    """A corpus by its name: ``embedded`` (functions of embedded CSNE that are not edited, each with its description);
    ``wikipedia``; ``hub:owner/name`` or ``hub:owner/name/folder`` (a hub dataset's Parquet files with a ``text`` column); or the
    path of a text file or a folder of text files (.txt, .md, .rst, .py; one document per file).

    Raises:
        StudyError: there is no such corpus, it is empty, or the hub cannot be reached.
    """
    if name == "embedded":
        return _embedded()
    place = WIKIPEDIA if name == "wikipedia" else name
    return _hub(name, place.removeprefix("hub:")) if place.startswith("hub:") else _files(name)


def _embedded() -> Corpus:
    from ...datasets.embedded_csne import load_content

    texts = [f"{function['doc']}\n{function['code']}" for function in load_content()["pool"]]
    identity = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    order = seeded_order(range(len(texts)), "corpus", SEED)
    return Corpus("embedded", identity, lambda: (texts[n] for n in order))


def _files(name: str) -> Corpus:
    path = Path(name)
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in _TEXT_FILES and f.is_file())
    if not files:
        raise StudyError(
            f"corpus {name!r} is not embedded, wikipedia, hub:OWNER/NAME, a text file, or a folder of text files "
            f"({', '.join(_TEXT_FILES)})"
        )
    digest = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files))
    order = seeded_order(range(len(files)), "corpus", SEED)

    def documents() -> Iterator[str]:
        for n in order:
            try:
                yield files[n].read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise StudyError(f"corpus file {files[n]} is not UTF-8 text: {error}; remove or convert it") from error

    return Corpus(name, digest.hexdigest(), documents)


def _hub(name: str, place: str) -> Corpus:
    """A corpus of Parquet shards, fetched one by one in a seeded order, and only as many as needed."""
    from huggingface_hub import HfApi, hf_hub_download

    owner, _, rest = place.partition("/")
    repository, _, folder = rest.partition("/")
    repo_id = f"{owner}/{repository}"
    try:
        info = HfApi().dataset_info(repo_id)
        names = [sibling.rfilename for sibling in info.siblings or []]
        shards = sorted(file for file in names if file.endswith(".parquet") and file.startswith(folder))
    except Exception as error:  # the client raises its own and its transport's errors
        raise StudyError(
            f"corpus {name!r}: the hub's dataset {repo_id!r} cannot be listed: {error}. Check the name and the network, "
            "or use corpus: embedded"
        ) from error
    if not shards:
        raise StudyError(f"corpus {name!r}: the hub's dataset {repo_id!r} has no Parquet files in {folder or '.'!r}")

    def documents() -> Iterator[str]:
        import pyarrow.parquet as parquet

        for shard in seeded_order(shards, "corpus", SEED):
            try:
                file = hf_hub_download(repo_id, shard, repo_type="dataset", revision=info.sha)
                column = parquet.read_table(file, columns=["text"])["text"]
            except Exception as error:
                raise StudyError(f"corpus {name!r}: {shard} cannot be read: {error}") from error
            for n in seeded_order(range(len(column)), "corpus", SEED, shard):
                yield column[n].as_py()

    return Corpus(name, f"{repo_id}@{info.sha}", documents)
