"""RQ3, A-GRACE: measured and shown."""
