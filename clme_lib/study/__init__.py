"""The study: runs, tables and figures, research questions, appendices."""
