"""Sphinx extension: the numbers in the prose come from a file that is computed from the published records, never typed.

``{{ name }}`` in a page of book/ stands for a text of ``results/numbers.json``. It is replaced in the page's source, by nothing
that could compute: notebooks show what datasets and models wrote, so MyST's own substitutions, which do, are off.
"""

import json
import re
from pathlib import Path

from sphinx.errors import ExtensionError


def fill_in(app, page, source):
    """Put the numbers into the source of a page."""
    if not page.startswith("book/") or Path(app.env.doc2path(page)).suffix != ".md":
        return
    numbers = json.loads((Path(app.srcdir) / "results" / "numbers.json").read_text(encoding="utf-8"))

    def number(name):
        if name[1] not in numbers:
            raise ExtensionError(f"{page}.md: {name[0]}: results/numbers.json has no number of that name")
        return numbers[name[1]]

    source[0] = re.sub(r"\{\{ *(.*?) *\}\}", number, source[0])


def setup(app):
    app.connect("source-read", fill_in)
    return {"parallel_read_safe": True, "version": "2"}
