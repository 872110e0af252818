"""The one exception that a user's mistake raises."""


class StudyError(Exception):
    """Something the user can mend; the message names the file, the field and the remedy."""
