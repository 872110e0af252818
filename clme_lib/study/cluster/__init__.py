"""A run's work on many machines with Ray: what is asked of which worker, and who keeps the records."""
