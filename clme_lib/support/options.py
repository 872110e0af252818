"""A command line generated from a configuration class: an option for each field, with the field's description as help.

A field's ``json_schema_extra`` may hold ``positional``, ``flags`` (instead of ``--field-name``), ``off`` (the flag that turns a
true field off) or ``pairs`` (the option takes NAME VALUE and may be repeated).
"""

from __future__ import annotations

import argparse
from typing import Any

from pydantic.fields import FieldInfo

from .schema import Schema


def add_options(parser: argparse.ArgumentParser, schema: type[Schema]) -> None:
    """Add an option for each field. Only the schema checks values and fills in defaults."""
    for name, field in schema.model_fields.items():
        extra: Any = field.json_schema_extra or {}
        shown = _help(field)
        if extra.get("positional"):
            parser.add_argument(name, nargs=None if field.is_required() else "?", default=argparse.SUPPRESS, help=shown)
            continue
        flags = extra.get("flags", (f"--{name.replace('_', '-')}",))
        keywords: dict[str, Any] = {"required": field.is_required(), "metavar": name.upper()}
        if field.annotation is bool:
            flags = (extra["off"],) if field.default else flags
            keywords = {"action": "store_false" if field.default else "store_true"}
        elif extra.get("pairs"):
            keywords = {"nargs": 2, "action": "append", "metavar": ("NAME", "VALUE")}
        parser.add_argument(*flags, dest=name, help=shown, default=argparse.SUPPRESS, **keywords)


def _help(field: FieldInfo) -> str:
    text = (field.description or "").replace("%", "%%")
    default = field.default
    if "(default: " in text or field.is_required() or default in (None, (), {}) or isinstance(default, bool):
        return text
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return f"{text} (default: {shown})" if shown else text
