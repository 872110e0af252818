"""The exceptions for errors that the user can correct."""

from __future__ import annotations


class StudyError(Exception):
    """An error that the user can correct; the message names the file, the field and the remedy."""


class CaseError(StudyError):
    """An error of a single case, which is recorded as failed while the others continue. Any other StudyError ends a run."""


def first_line(error: BaseException) -> str:
    """The message of another library's error, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
