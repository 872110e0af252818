"""The appendices, each measurement beside its table."""
