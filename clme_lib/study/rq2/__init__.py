"""RQ2, what an edit costs: measured, counted, and shown."""
