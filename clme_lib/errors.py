"""The one exception that a user's mistake raises."""


class StudyError(Exception):
    """Something the user can mend; the message names the file, the field and the remedy."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
