"""From edits to records: generating, scoring, keeping."""
