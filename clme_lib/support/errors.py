"""The one exception that a user's mistake raises."""

from __future__ import annotations


class StudyError(Exception):
    """Something the user can mend; the message names the file, the field and the remedy."""


class CaseError(StudyError):
    """What is wrong with a single case: it is recorded as failed, and the others go on. Any other StudyError ends a run."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
