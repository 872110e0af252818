"""The editors, one file each, and what they share."""
