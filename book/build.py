"""Render the book: stage its sources under _build/, run Jupyter Book with warnings as errors, and check the pages.

usage: python book/build.py [OWN_RUN.ipynb]

The working tree is not touched. OWN_RUN.ipynb, the RQ1 notebook executed on this machine, becomes the page
"Re-run on this machine"; without it that page says that there is none.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
STAGE = ROOT / "_build" / "source"
HTML = ROOT / "_build" / "html"
_LOCAL_STATE = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.part")


def stage(own_run: Path | None) -> None:
    """Copy what the book consists of."""
    shutil.rmtree(STAGE, ignore_errors=True)
    STAGE.mkdir(parents=True)
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(ROOT / name, STAGE)
    for name in ("book", "results"):
        shutil.copytree(ROOT / name, STAGE / name, ignore=_LOCAL_STATE)
    if own_run:
        notebook = json.loads(own_run.read_text(encoding="utf-8"))
        if "exception" in notebook["metadata"].get("papermill", {}):
            sys.exit(f"{own_run}: the notebook failed; run it again")
        text = json.dumps(notebook)
        # its tables and figures are numbered beside the published page's, so they need labels of their own
        text = text.replace("-rq1-", "-own-").replace("(rq1)=", "(own-run)=")
        text = text.replace("# RQ1: Proficiency", "# Re-run on this machine", 1)
        (STAGE / "book" / "own_run.md").unlink()
        (STAGE / "book" / "own_run.ipynb").write_text(text, encoding="utf-8")


def render() -> None:
    """Jupyter Book, every warning an error."""
    shutil.rmtree(HTML, ignore_errors=True)
    command = [
        "jupyter-book",
        "build",
        str(STAGE),
        "--path-output",
        str(ROOT),
        "-W",
        "-n",
        "--keep-going",
        "--all",
    ]
    done = subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], capture_output=True, text=True)
    (ROOT / "_build" / "build.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        problems = [line for line in (done.stdout + done.stderr).splitlines() if re.search("WARNING|ERROR|rror:", line)]
        sys.exit("the book did not build cleanly (whole log: _build/build.log):\n" + "\n".join(problems[-20:]))


def prune_mathjax() -> None:
    """Keep the part of MathJax that the pages load (2 of 24 MB)."""
    folder = HTML / "_static" / "mathjax"
    kept = re.compile(r"^(tex-chtml\.js|input/tex/extensions/.*|output/chtml/fonts/.*)$")
    for file in sorted(folder.rglob("*"), reverse=True):
        if file.is_file() and not kept.match(file.relative_to(folder).as_posix()):
            file.unlink()
        elif file.is_dir() and not any(file.iterdir()):
            file.rmdir()


def check() -> None:
    """Every chapter has a page, and no page loads anything from outside the site."""
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    names = [contents["root"], *(chapter["file"] for chapter in contents["chapters"])]
    missing = [name for name in names if not (HTML / f"{name}.html").is_file()]
    if missing:
        sys.exit(f"pages missing from the site: {', '.join(missing)}")
    for page in HTML.rglob("*.html"):
        if found := re.search(
            r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(https?://[^"]+)"',
            page.read_text(encoding="utf-8"),
        ):
            sys.exit(f"{page.relative_to(HTML)} loads {found[1]}: the site must read offline")


if __name__ == "__main__":
    stage(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    render()
    prune_mathjax()
    check()
    print(f"the book: {HTML / 'index.html'}")
