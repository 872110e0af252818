"""Second moments of a layer's keys: how ROME (by option), MEMIT and PMET know which directions other texts use.

``C_l = (1/n) sum k k^T`` over every token of a corpus, ``k`` the input of ``W_l`` (Meng et al. 2023, equation 15). Gathered once
per subject, layer and corpus, in float32, block by block up to the highest layer asked for; kept in the user's cache
as safetensors whose header says what it is. An interrupted gathering goes on where it stopped.

Lookup-aware statistics (not in the paper): every prompt ends in the same token, so the keys at that token resemble each other far more
than the keys in a text do, and an update along ``C^-1 k`` acts on all of them. With ``lookup_weight`` w > 0 and ``statistics_ridge`` rho,
the editors use instead of ``C``::

    S = C + w C_lookup,   S + rho (tr S / d_f) I

``C_lookup`` is the second moment of the keys at the lookup token only, over prompts of cases that are not edited.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from pydantic import Field
from tqdm import tqdm

from ...forward.blockwise import Blockwise
from ...forward.tokens import encode
from ...subjects.products import matrix_product
from ...subjects.subject import Subject
from ...support.artifact import Artifact
from ...support.batching import of_like_length
from ...support.errors import StudyError
from ...support.schema import Schema
from ...support.seeds import generator
from .corpora import SEED, Corpus, open_corpus

FORMAT = "clme-second-moment"
# at ten the write directions still differ visibly from those of four times as many, because tokens of one document
# resemble each other; a corpus that ends earlier is accepted from ten on
TOKENS_PER_DIMENSION, LEAST_PER_DIMENSION = 40, 10
DOCUMENT_TOKENS = 4_096  # longer documents are cut
_PASS_TOKENS = 4_096  # tokens, padding included, of one pass
_DESCRIBED = ("corpus", "identity", "documents", "tokens", "lookup_prompts")
_CHUNK_DOCUMENTS = 256  # documents sorted by length together; gathering resumes at such a chunk


class StatisticsHyperparameters(Schema):
    """Where second moments come from: a ``corpus`` as :func:`~clme_lib.editors.locate_then_edit.corpora.open_corpus` takes it,
    and how many of its documents (of any length) or tokens to use. By default: forty tokens per dimension of the key, or the whole
    corpus if that has at least ten.

    ``lookup_weight`` is the factor with which the second moment of lookup tokens' keys is added, gathered from the prompts of
    ``lookup_records`` cases; ``statistics_ridge`` is added to the diagonal, in units of its mean.
    """

    corpus: str = "embedded"
    corpus_documents: int | None = Field(default=None, gt=0)
    corpus_tokens: int | None = Field(default=None, gt=0)
    lookup_weight: float = Field(default=0.0, ge=0)
    lookup_records: int = Field(default=200, gt=0)
    statistics_ridge: float = Field(default=0.0, ge=0)


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """``C_l`` of one layer: its ``matrix`` (d_f, d_f) in float32, on the CPU, because edits only need its factor, which is on
    ``device``; ``header`` says what it was gathered from."""

    matrix: torch.Tensor
    header: dict
    device: torch.device

    def describe(self) -> dict:
        """Corpus, documents and tokens, for a run's provenance."""
        return {name: self.header[name] for name in _DESCRIBED if name in self.header}

    def adjusted(self, lookup_keys: torch.Tensor | None, weight: float, ridge: float) -> SecondMoment:
        """This moment plus ``weight`` times that of ``lookup_keys`` (P, d_f), plus ``ridge`` times the diagonal's mean on the diagonal."""
        matrix, header = self.matrix.double(), self.header
        if lookup_keys is not None:
            keys = lookup_keys.double().cpu()
            matrix, header = matrix + weight * keys.T @ keys / len(keys), {**header, "lookup_prompts": len(keys)}
        diagonal = ridge * matrix.trace() / len(matrix) * torch.eye(len(matrix), dtype=torch.double)
        return replace(self, matrix=(matrix + diagonal).float(), header=header)

    @cached_property
    def factor(self) -> torch.Tensor:
        """Lower Cholesky factor in float64, made once; StudyError if the matrix is not positive definite."""
        factor, failed = torch.linalg.cholesky_ex(self.matrix.to(self.device).double())
        if failed or not factor.isfinite().all():
            raise StudyError(
                f"the second moment of layer {self.header['layer']} from {self.header['tokens']} tokens of "
                f"{self.header['corpus']} is not positive definite: gather it from more text (corpus_tokens), or from more varied text"
            )
        return factor

    def solve(self, keys: torch.Tensor) -> torch.Tensor:
        """``C^-1 k`` of each row of ``keys`` (B, d_f), in float64."""
        return torch.cholesky_solve(keys.double().T, self.factor).T


def random_moments(subject: Subject, layers: Sequence[int], seed: int) -> dict[int, SecondMoment]:
    """Stand-ins for measurements: one well-conditioned random positive-definite matrix, factorised separately for each layer."""
    samples = torch.randn(subject.inner_size, 64, generator=generator(seed, "second moment")).to(subject.device)
    matrix = torch.addmm(torch.eye(subject.inner_size, device=subject.device), samples, samples.T, alpha=1 / 64).cpu()
    header = {"corpus": "random", "identity": f"seed {seed}", "documents": 0, "tokens": 0}
    return {layer: SecondMoment(matrix, {**header, "layer": layer}, subject.device) for layer in layers}


def second_moments(
    subject: Subject, layers: Sequence[int], hparams: StatisticsHyperparameters
) -> dict[int, SecondMoment]:
    """Second moments of the given layers, from the cache or gathered now; StudyError if the corpus is too small or a file is damaged."""
    corpus, size = open_corpus(hparams.corpus), subject.inner_size
    limited = hparams.corpus_tokens or hparams.corpus_documents
    least = (hparams.corpus_tokens or size) if limited else LEAST_PER_DIMENSION * size
    identity = {
        "format": FORMAT,
        "version": 1,
        **subject.identity,
        "corpus": corpus.name,
        "identity": corpus.identity,
        "sample_seed": SEED,
        "wanted_documents": hparams.corpus_documents,
        "wanted_tokens": hparams.corpus_tokens if limited else TOKENS_PER_DIMENSION * size,
        "document_tokens": DOCUMENT_TOKENS,
    }
    files = {layer: _artifact(identity, layer=layer) for layer in layers}
    if not all(file.exists() for file in files.values()):
        with contextlib.ExitStack() as held:
            for _, file in sorted(
                files.items()
            ):  # in the same order everywhere, so that no two processes wait for each other
                held.enter_context(file.made_once())
            if absent := {layer: file for layer, file in sorted(files.items()) if not file.exists()}:
                _gather(subject, absent, corpus, identity, least)
    moments = {}
    for layer, file in files.items():
        header, tensors = file.read()
        matrix = tensors.get("matrix")
        if matrix is None or matrix.shape != (size, size) or not matrix.isfinite().all():
            raise StudyError(f"{file.file}: not a finite {size} x {size} matrix; remove the file to gather it again")
        _require(header["tokens"], least, corpus, subject)
        moments[layer] = SecondMoment(matrix, header, subject.device)
    return moments


def _artifact(identity: dict, **what: Any) -> Artifact:
    """A file with a readable name: subject, corpus and layer, or the layers of a gathering in progress."""
    ((name, value),) = what.items()
    prefix = f"{identity['subject']}-{identity['corpus'][-60:]}-{name}-{value}"  # a corpus may be a long path
    return Artifact.cached("statistics", prefix, {**identity, **what})


def _require(tokens: int, least: int, corpus: Corpus, subject: Subject) -> None:
    if tokens < least:
        raise StudyError(
            f"corpus {corpus.name!r} has only {tokens} tokens for {subject.name}, but {least} are needed "
            f"(the key has {subject.inner_size} dimensions): use a larger corpus, or set corpus_tokens"
        )


def _gather(subject: Subject, files: dict[int, Artifact], corpus: Corpus, identity: dict, least: int) -> None:
    """Sum ``k k^T`` over the corpus for several layers at once, and write their files (by layer) if it has the ``least`` tokens."""
    unfinished = _artifact(identity, unfinished="-".join(map(str, files)))
    sums = {layer: torch.zeros(subject.inner_size, subject.inner_size, device=subject.device) for layer in files}
    documents = tokens = 0
    if unfinished.exists():
        before, kept = unfinished.read()
        documents, tokens = before["documents"], before["tokens"]
        sums = {layer: kept[str(layer)].to(subject.device) for layer in files}
    token_count = identity["wanted_tokens"]
    limit = token_count or sys.maxsize
    longest = min(DOCUMENT_TOKENS, subject.model.config.max_position_embeddings)
    texts = islice(corpus.documents(), documents, identity["wanted_documents"])
    with tqdm(total=token_count, initial=tokens, desc=f"statistics of {subject.name}", unit="token") as bar:
        while rows := _next_rows(subject, texts, longest, limit - tokens):
            full = [row for row in rows if row]
            for group in of_like_length(list(map(len, full)), tokens=_PASS_TOKENS, longest_first=True):
                _add(subject, [full[n] for n in group], sums)
            read = sum(map(len, full))
            documents, tokens = documents + len(rows), tokens + read
            bar.update(read)
            partial_sums = {str(layer): total for layer, total in sums.items()}
            unfinished.write(partial_sums, documents=documents, tokens=tokens)
    _require(tokens, least, corpus, subject)
    if tokens < subject.inner_size:
        raise StudyError(
            f"corpus_tokens={limit} is less than the {subject.inner_size} dimensions of the key: the second moment would be singular"
        )
    for layer, total in sums.items():
        files[layer].write({"matrix": total / tokens}, documents=documents, tokens=tokens)
    unfinished.file.unlink(missing_ok=True)  # another process may have gathered the same


def _next_rows(subject: Subject, texts: Iterator[str], longest: int, left: int) -> list[list[int]]:
    """Token ids of the next documents, at most ``left`` tokens; empty if the texts or the tokens are used up."""
    rows: list[list[int]] = []
    while left and len(rows) < _CHUNK_DOCUMENTS and (text := next(texts, None)) is not None:
        rows.append(encode(subject.tokenizer, text)[: min(longest, left)])
        left -= len(rows[-1])
    return rows


@torch.no_grad()
def _add(subject: Subject, rows: list[list[int]], sums: dict[int, torch.Tensor]) -> None:
    walk = Blockwise(subject, rows)
    hidden = walk.embedded
    for layer in range(max(sums) + 1):
        here = walk.block(layer, hidden)
        hidden = here.hidden
        if layer in sums:
            keys = here.keys[walk.mask].float()
            sums[layer] += matrix_product(keys.T, keys.T)
