"""Distributing a run over many machines with Ray: which worker does what, and which process writes the records."""
