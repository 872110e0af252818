"""An edit is a value: its kinds, running a model as edited, and edits on disk."""
