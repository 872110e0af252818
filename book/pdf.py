"""Print the whole book as one PDF: all pages as a single page, printed by Chromium.

usage: python book/pdf.py [BOOK.pdf] [PAGE=NOTEBOOK.ipynb ...]    (make pdf)
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import build

SINGLE = build.ROOT / "_build" / "singlehtml"
LIMIT = 600  # seconds


def main(target: Path, replacements: dict[str, Path]) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    if browser is None:
        sys.exit("a PDF is printed by Chromium or Chrome, and neither is installed")
    build.stage(replacements)
    build.render("singlehtml", SINGLE)
    build.finish(SINGLE)
    # the page's links are relative to the top folder, but the page itself is in a folder below
    page = Path(shutil.copy(SINGLE / f"{build.pages()[0]}.html", SINGLE / "whole.html"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            f"--user-data-dir={profile}",
        ]
        printed = ["--no-pdf-header-footer", "--virtual-time-budget=60000", f"--print-to-pdf={target.resolve()}"]
        subprocess.run([browser, *flags, *printed, f"file://{page}"], check=True, capture_output=True, timeout=LIMIT)
    print(f"the book: {target}")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    pages = {page: Path(notebook) for page, sign, notebook in (text.partition("=") for text in arguments) if sign}
    targets = [Path(text) for text in arguments if "=" not in text]
    main(targets[0] if targets else build.ROOT / "_build" / "clme-book.pdf", pages)
