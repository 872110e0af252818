"""The paper's study: runs, tables and figures, research questions, appendices."""
