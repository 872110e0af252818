"""Typed configuration: one base class, and validation that names the place and the field."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import StudyError


class Schema(BaseModel):
    """Base of every typed piece of configuration: frozen; an unknown key is an error, and so is ``true`` for a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, content: Any) -> Any:
        for name in _numbers(cls) if isinstance(content, dict) else ():
            if place := _truth_at(name, content.get(name)):
                raise ValueError(f"{place} is a number, not true or false")
        return content


@cache
def _numbers(schema: type[Schema]) -> list[str]:
    """The fields that hold numbers, or lists or mappings of them."""
    types = {name: str(field.annotation) for name, field in schema.model_fields.items()}
    return [name for name, kind in types.items() if re.search(r"\b(int|float)\b", kind) and "bool" not in kind]


def _truth_at(name: str, value: Any) -> str | None:
    """Where ``true`` or ``false`` stands in a value, as the name of the field and of the parts it lies in."""
    if isinstance(value, bool):
        return name
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return next((place for part, held in parts if (place := _truth_at(f"{name}.{part}", held))), None)


def _ascending(layers: tuple[int, ...]) -> tuple[int, ...]:
    if list(layers) != sorted(set(layers)):
        raise ValueError("layers must be in ascending order, each once")
    return layers


Layers = Annotated[tuple[int, ...], Field(min_length=1), AfterValidator(_ascending)]
Parsed = TypeVar("Parsed", bound=BaseModel)


def parse(schema: type[Parsed], content: Any, where: str, *, strict: bool = False) -> Parsed:
    """Validate ``content`` against ``schema``; on failure name the place, the field and the known fields.

    ``strict`` is for JSON that a program wrote: no text or fraction is taken for a whole number.
    """
    try:
        return (
            schema.model_validate_json(json.dumps(content), strict=True) if strict else schema.model_validate(content)
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "(top level)"
        reason = first["msg"].removeprefix("Value error, ").replace("Extra inputs are not permitted", "unknown key")
        if (
            not first["loc"] and first["type"] == "value_error"
        ):  # an error about how fields go together, not about one value
            raise StudyError(f"{where}: {reason}") from None
        # A list of the fields helps with a misspelt name, not with a wrong value.
        known = f"; known: {', '.join(schema.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise StudyError(f"{where}: {field}: {reason} (got {first.get('input')!r}){known}") from None
