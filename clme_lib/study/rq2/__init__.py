"""RQ2: the cost of an edit, as measured and as counted."""
