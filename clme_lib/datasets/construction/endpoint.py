"""Querying a language model behind any OpenAI-compatible endpoint, without paying twice.

Every answer is appended to a cache file as soon as it arrives, under the hash of model, settings and question, so a question answered
before a crash is not asked again. The ``openai`` client retries with back-off on rate limits, time-outs and server errors.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from ...support.errors import StudyError
from ...support.journal import append_rows, read_rows

_SURROGATE = re.compile("[\ud800-\udfff]")
_LONGEST_ANSWER = 256  # tokens
_FRAME = 1_000  # tokens that an endpoint may add around a question


class Endpoint:
    """A language model, queried at temperature 0.

    Args:
        model: its name at the endpoint.
        url: the endpoint's base, such as ``http://localhost:8000/v1`` (None: OpenAI's own).
        cache: JSON Lines file of answers.
        concurrency: maximum number of parallel requests.
        budget: maximum number of tokens in the cache, questions and answers together (None: no limit).
        retries: how often the client retries, waiting longer each time.

    The key is taken from the environment variable ``OPENAI_API_KEY``; a local endpoint may need none.
    """

    def __init__(
        self,
        model: str,
        url: str | None,
        cache: Path,
        *,
        concurrency: int = 8,
        budget: int | None = None,
        retries: int = 6,
        timeout: float = 60.0,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise StudyError(
                "a language model is queried with the package openai: pip install -c constraints.txt -e '.[construct]'"
            ) from error
        key = os.environ.get("OPENAI_API_KEY") or ("none" if url else None)
        if key is None:
            raise StudyError("OPENAI_API_KEY is not set: set it, or name your endpoint with --endpoint")
        self.cache, self.concurrency, self.budget = cache, concurrency, budget
        self.settings: dict[str, Any] = {"model": model, "temperature": 0}  # what an answer depends on
        self._client = openai.OpenAI(api_key=key, base_url=url, max_retries=retries, timeout=timeout)
        self._known: dict[str, str] = {}
        self.spent = 0
        for number, row in enumerate(read_rows(cache), 1):
            answer, tokens = row.get("answer"), row.get("tokens")
            if (
                not isinstance(row.get("key"), str)
                or not isinstance(answer, str)
                or type(tokens) is not int
                or tokens < 0
            ):
                raise StudyError(
                    f"{cache}, line {number}: expected an answer with its key and tokens; remove the line to ask again"
                )
            self._known[row["key"]] = answer
            self.spent += tokens

    def ask(self, instruction: str, questions: Sequence[str]) -> Iterator[str]:
        """The answers in the order of the questions, whatever order they arrive in, so that builds are reproducible.

        Raises:
            StudyError: the endpoint refuses or cannot be reached, or the budget is spent; answers so far are kept.
        """
        contents = [json.dumps([self.settings, instruction, question]) for question in questions]
        keys = [hashlib.sha256(content.encode()).hexdigest() for content in contents]
        unknown = {key: question for key, question in zip(keys, questions) if key not in self._known}
        waiting = deque(unknown.items())
        answered = 0
        under_way: dict[Future, str] = {}
        failure: StudyError | None = None
        with ThreadPoolExecutor(self.concurrency) as pool:
            while True:
                if failure is None and waiting and self.budget is not None and self.spent >= self.budget:
                    failure = StudyError(
                        f"the budget of {self.budget} tokens is spent ({self.spent} used); {len(waiting)} questions are left: start again "
                        "with a larger --budget (the answers are kept)"
                    )
                while failure is None and waiting and len(under_way) < self.concurrency:
                    key, question = waiting.popleft()
                    under_way[pool.submit(self._answer, instruction, question)] = key
                while answered < len(keys) and keys[answered] in self._known:
                    yield self._known[keys[answered]]
                    answered += 1
                if not under_way:
                    break
                done, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in done:
                    key = under_way.pop(future)
                    try:
                        answer, tokens = future.result()
                    except StudyError as error:
                        failure = failure or error
                        continue
                    append_rows(self.cache, [{"key": key, "answer": answer, "tokens": tokens}])
                    self._known[key] = answer
                    self.spent += tokens
            if failure:
                raise failure

    def _answer(self, instruction: str, question: str) -> tuple[str, int]:
        import openai

        messages: Any = [{"role": "system", "content": instruction}, {"role": "user", "content": question}]
        try:
            reply = self._client.chat.completions.create(messages=messages, max_tokens=_LONGEST_ANSWER, **self.settings)
            if not reply.choices:
                raise ValueError("the reply has no choices")
            answer: Any = reply.choices[0].message.content  # the client does not check types
            if not isinstance(answer, str | None):
                raise ValueError(f"the answer is {type(answer).__name__}, expected text")
            answer = _SURROGATE.sub("\ufffd", answer or "")  # a file that contains one could not be read
            return answer, _tokens(reply.usage, instruction + question + answer)
        except (openai.OpenAIError, ValueError, AttributeError, TypeError, LookupError) as error:
            raise StudyError(
                f"{self._client.base_url}: {type(error).__name__}: {str(error)[:300]}; the answers so far are kept in {self.cache}; "
                "run the same command again to resume"
            ) from error


def _tokens(usage: Any, text: str) -> int:
    """The tokens that an endpoint reports; without a plausible report, the number of bytes of the text, which is larger."""
    said, most = getattr(usage, "total_tokens", None), len(text.encode())
    return said if type(said) is int and 0 < said <= most + _LONGEST_ANSWER + _FRAME else most
