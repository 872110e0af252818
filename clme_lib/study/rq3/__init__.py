"""RQ3: A-GRACE's measurements and tables."""
