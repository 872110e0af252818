"""Typed configuration: one base class, and validation that names the place and the field."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from .errors import StudyError


class Schema(BaseModel):
    """Base of every typed piece of configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _ascending(layers: tuple[int, ...]) -> tuple[int, ...]:
    if list(layers) != sorted(set(layers)):
        raise ValueError("layers must be in ascending order, each once")
    return layers


Layers = Annotated[tuple[int, ...], Field(min_length=1), AfterValidator(_ascending)]
Parsed = TypeVar("Parsed", bound=BaseModel)


def parse(schema: type[Parsed], content: Any, where: str) -> Parsed:
    """Validate ``content`` against ``schema``; on failure name the place, the field and the known fields."""
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "(top level)"
        reason = first["msg"].replace("Extra inputs are not permitted", "unknown key")
        # A list of the fields helps with a misspelt name, not with a wrong value.
        known = f"; known: {', '.join(schema.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise StudyError(f"{where}: {field}: {reason} (got {first.get('input')!r}){known}") from None
