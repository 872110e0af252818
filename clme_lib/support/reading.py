"""Reading untrusted JSON and YAML: ambiguous content, and values that are not valid text or numbers, are refused with their location.

Refused are duplicate keys, NaN and infinity, lone surrogates, nesting that would overflow a reader, and YAML's aliases (with
which a few lines can expand to gigabytes).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from .errors import StudyError

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_TOO_DEEP = "it is nested too deeply"


def read_json(path: Path | str) -> Any:
    """The content of a JSON file in UTF-8.

    Raises:
        StudyError: it cannot be read, or is refused (see the module); the message names the file and the place.
    """
    return parse_json(_read(path, "JSON"), str(path))


def parse_json(text: str | bytes, where: str) -> Any:
    """JSON text as a value; StudyError begins with ``where``."""
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        content = json.loads(
            decoded, object_pairs_hook=_each_key_once, parse_float=_finite, parse_constant=_not_a_number
        )
    except RecursionError:
        raise StudyError(f"{where}: cannot be read as JSON: {_TOO_DEEP}") from None
    except ValueError as error:
        raise StudyError(f"{where}: cannot be read as UTF-8 JSON: {error}") from error
    if _SURROGATE_ESCAPE.search(decoded):
        for place, string in _strings(content):
            if _SURROGATE.search(string):
                raise StudyError(f"{where}: {place or '(top level)'}: a lone surrogate is not a character: remove it")
    return content


def read_yaml(path: Path | str) -> Any:
    """The content of a YAML file in UTF-8; StudyError as for :func:`read_json`."""
    try:
        return parse_yaml(_read(path, "YAML").decode("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise StudyError(f"{path}: cannot be read as UTF-8 YAML: {error}") from error


def parse_yaml(text: str, where: str) -> Any:
    """YAML text as a value; StudyError begins with ``where``."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except RecursionError:
        raise StudyError(f"{where}: cannot be read as YAML: {_TOO_DEEP}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise StudyError(f"{where}: cannot be read as YAML: {error}") from error


def _read(path: Path | str, what: str) -> bytes:
    try:
        if not Path(path).is_file() and Path(path).exists():
            raise ValueError("it is a folder or a device")
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise StudyError(f"{path}: cannot be read as {what}: {error}") from error


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {max(keys, key=keys.count)!r} occurs twice in one object")
    return content


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"{digits} is too large for a number")
    return number


def _not_a_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _strings(content: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every string of a value, keys included, with its place."""
    if isinstance(content, str):
        yield place, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield place, key
            yield from _strings(value, f"{place}.{key}".lstrip("."))
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from _strings(value, f"{place}.{number}".lstrip("."))


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)
