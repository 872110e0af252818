"""Render the book: stage its sources under _build/, run Jupyter Book with warnings as errors, and check the pages.

usage: python book/build.py [PAGE=NOTEBOOK.ipynb ...]

The working tree is not changed. A NOTEBOOK executed on this machine replaces a PAGE of the table of contents and gets its
title: the reader's own run replaces book/own_run, which otherwise says that there is no such run.
"""

import datetime
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import layers
import yaml

from clme_lib.evaluation.records import Record
from clme_lib.study import leaderboard, provenance

ROOT = Path(__file__).resolve().parent.parent
STAGE = ROOT / "_build" / "source"
HTML = ROOT / "_build" / "html"
BENCHMARK = "results/notebooks/benchmark"
_LOCAL_STATE = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.part")
# a page's label and title, at its top
_TITLE = re.compile(r"\A(?:\(.+\)=\n)?# .+$", re.M)
# where a page defines a label: before a heading, in a directive, after an equation
_DEFINITION = re.compile(
    r"^\((?P<target>[^\s()]+)\)=$|^:(?:name|label):[ ]+(?P<option>\S+)$|^\$\$ \((?P<equation>\S+)\)$", re.M
)
# where a page refers to a label: {role}`label`, {role}`text <label>`, [text](#label)
_REFERENCE = re.compile(r"\{\w+\}`(?:[^`<]*<)?(?P<role>[^`<>]+)>?`|\]\(#(?P<link>[^\s()]+)\)")

# a table made by the library; it is wide if it has more than this many columns, or characters in a row
_TABLE = re.compile(r"(?P<head>^```\{table\}.*\n)(?P<rest>:name: \S+\n\n(?P<rows>(?:\|.*\n)+))", re.M)
_WIDE = 6, 500
# titles of columns that begin with a measure's short name
_MEASURES = {"Eff.": "Effectiveness", "Gen.": "Generalization", "Spec.": "Specificity"}
_MEASURE = re.compile(r"(Eff\.|Gen\.|Spec\.) (EM|BLEU|R-L|kept)")
# tags of cells whose code a page does not show in place
_HIDDEN = {"hide-input", "parameters", "injected-parameters"}

# content that no output of a notebook needs: it runs, loads or reads something, as HTML or as MyST
_ACTIVE = {
    "text/html": re.compile(
        r"<(?:script|iframe|object|embed|link|meta|base|form)\b|<[^>]*\s(?:on\w+\s*=|(?:href|src)\s*=[\s\"']*javascript:)",
        re.I,
    ),
    "text/markdown": re.compile(r"\{(?:raw|eval-rst|include|literalinclude|code-cell)\}"),
    "image/svg+xml": re.compile(
        r"<(?:script|foreignObject|iframe)\b|<[^>]*\s(?:on\w+\s*=|href\s*=[\s\"']*(?!#)\S)", re.I
    ),
    "application/javascript": re.compile(""),
}


def pages() -> list[str]:
    """The pages of the table of contents, in its order, without suffixes."""
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    chapters = [chapter for part in contents.get("parts", [contents]) for chapter in part["chapters"]]
    files = [page["file"] for chapter in chapters for page in (chapter, *chapter.get("sections", ()))]
    return [contents["root"], *files]


def stage(replacements: dict[str, Path]) -> None:
    """Copy the book's sources, with executed notebooks in place of some pages."""
    shutil.rmtree(STAGE, ignore_errors=True)
    STAGE.mkdir(parents=True)
    for name in ("_config.yml", "_toc.yml", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, STAGE)
    config = (STAGE / "_config.yml").read_text(encoding="utf-8")
    today = datetime.date.today().isoformat()
    config = config.replace("COMMIT", provenance.commit()[:10]).replace("DATE", today)
    (STAGE / "_config.yml").write_text(config, encoding="utf-8")
    for name in ("book", "results"):
        shutil.copytree(ROOT / name, STAGE / name, ignore=_LOCAL_STATE)
    for page, notebook in replacements.items():
        _replace(page, notebook)
    for page in pages():
        _refuse_active_outputs(page)
    (STAGE / "book" / "_static" / "layers.svg").write_text(layers.draw(ROOT / "clme_lib"), encoding="utf-8")
    # a benchmark chapter executed here shows texts that may not be published, so this book must not be shared
    local = BENCHMARK in replacements
    board = leaderboard.write(STAGE / "results", STAGE / "book" / "_static" / "leaderboard", local)
    (STAGE / "book" / "_leaderboard.md").write_text(board + "\n", encoding="utf-8")
    (STAGE / "book" / "_fields.md").write_text(_fields(), encoding="utf-8")
    used: set[str] = set()
    for page in pages():
        used |= _make_labels_unique(page, used)
        _present(page)


def _fields() -> str:
    """The fields of a record, as its schema describes them."""
    rows = [f"| `{name}` | {field.description} |" for name, field in Record.model_fields.items()]
    return "\n".join(["| Field | |", "| --- | --- |", *rows, ""])


def _file(page: str) -> Path:
    files = [STAGE / f"{page}{suffix}" for suffix in (".md", ".ipynb")]
    return next((file for file in files if file.is_file()), files[0])


def _replace(page: str, notebook: Path) -> None:
    """Replace a page by a notebook, which gets the page's label and title."""
    if page not in pages():
        sys.exit(f"{page}: no page of _toc.yml; there are {', '.join(pages())}")
    content = json.loads(notebook.read_text(encoding="utf-8"))
    if "exception" in content["metadata"].get("papermill", {}):
        sys.exit(f"{notebook}: the notebook failed; run it again")
    replaced = _file(page)
    title = _TITLE.search(_markdown(replaced)[0])
    first = content["cells"][0]
    first["source"] = _TITLE.sub(lambda _: title[0], "".join(first["source"]))
    replaced.unlink()
    (STAGE / f"{page}.ipynb").write_text(json.dumps(content), encoding="utf-8")


def _markdown(file: Path) -> list[str]:
    """The Markdown of a page: a file's text, or the Markdown of a notebook's cells and outputs."""
    texts: list[str] = []
    _rewrite(file, lambda text: texts.append(text) or text)
    return texts


def _rewrite(file: Path, change: Callable[[str], str]) -> None:
    """Change the Markdown of a page, including the names of a notebook's figures (as ``:name:`` options)."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        file.write_text(change(text), encoding="utf-8")
        return
    content = json.loads(text)
    for cell in content["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = change("".join(cell["source"]))
        for output in cell.get("outputs", []):
            if "text/markdown" in output.get("data", {}):
                output["data"]["text/markdown"] = change("".join(output["data"]["text/markdown"]))
        if name := cell["metadata"].get("mystnb", {}).get("figure", {}).get("name"):
            cell["metadata"]["mystnb"]["figure"]["name"] = change(f":name: {name}").removeprefix(":name: ")
    file.write_text(json.dumps(content), encoding="utf-8")


def _make_labels_unique(page: str, used: set[str]) -> set[str]:
    """Add the page's name to those of its labels that an earlier page uses, and to its references to them; returns its labels.

    This allows a copy of a notebook to be a page next to the original.
    """
    file = _file(page)
    own = {match[match.lastgroup] for text in _markdown(file) for match in _DEFINITION.finditer(text)}
    renamed = {label: f"{label}-{re.sub(r'[^a-z0-9]+', '-', page.lower())}" for label in own & used}

    def rename(match: re.Match[str]) -> str:
        label, (start, end) = match[match.lastgroup], match.span(match.lastgroup)
        return match.string[match.start() : start] + renamed.get(label, label) + match.string[end : match.end()]

    if renamed:
        _rewrite(file, lambda text: _REFERENCE.sub(rename, _DEFINITION.sub(rename, text)))
    return {renamed.get(label, label) for label in own}


def _refuse_active_outputs(page: str) -> None:
    """Exit if a notebook has an output with active content: the library shows texts of datasets and models as text only."""
    if (file := _file(page)).suffix == ".md":
        return
    for number, cell in enumerate(json.loads(file.read_text(encoding="utf-8"))["cells"]):
        for output in cell.get("outputs", []):
            shown = {
                kind: "".join(text) for kind, text in output.get("data", {}).items() if isinstance(text, str | list)
            }
            shown["text/html"] = shown.get("text/html", "") + shown.get("text/markdown", "")  # HTML is Markdown as well
            for kind, active in _ACTIVE.items():
                if kind in shown and (part := active.search(shown[kind])):
                    sys.exit(
                        f"{page}: an output of cell {number} holds {part[0] or kind!r}: show it as text or as an image"
                    )


def _present(page: str) -> None:
    """Prepare a notebook as a page: its hidden code goes into one box at its end, and captions become its figures' alternative text."""
    if (file := _file(page)).suffix == ".md":
        return
    _rewrite(file, _widen)
    content = json.loads(file.read_text(encoding="utf-8"))
    hidden: list[str] = []
    for cell in content["cells"]:
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] == "code" and _HIDDEN & set(tags):
            cell["metadata"]["tags"] = [tag for tag in tags if tag not in _HIDDEN] + ["remove-input"]
            hidden.append("".join(cell["source"]))
        if caption := cell["metadata"].get("mystnb", {}).get("figure", {}).get("caption"):
            cell["metadata"]["mystnb"]["image"] = {"alt": caption}
    if hidden:
        code = "\n\n".join(hidden)
        fence = "`" * (2 + max([1, *map(len, re.findall("`+", code))]))
        given = content["metadata"].get("papermill", {}).get("parameters", {})
        listed = "".join(f" `{name} = {json.dumps(value)}`" for name, value in given.items()) or " none beside its own"
        box = (
            f"{fence}`{{admonition}} How this was made\n:class: dropdown\n\npapermill executed the notebook below; it was passed:{listed}."
            f"\n\n{fence}python\n{code}\n{fence}\n{fence}`"
        )
        content["cells"].append({"cell_type": "markdown", "id": "how-this-was-made", "metadata": {}, "source": box})
    file.write_text(json.dumps(content), encoding="utf-8")


def _widen(text: str) -> str:
    """Let tables with many columns or long cells extend into the page's margin."""

    def widened(match: re.Match[str]) -> str:
        rows, (columns, characters) = match["rows"].splitlines(), _WIDE
        wide = rows[0].count("|") > columns or max(map(len, rows)) > characters
        return match["head"] + (":class: full-width\n" if wide else "") + match["rest"]

    return _TABLE.sub(widened, text)


def render(builder: str = "html", target: Path = HTML) -> None:
    """Run Jupyter Book, treating every warning as an error."""
    shutil.rmtree(target, ignore_errors=True)
    options = ["--path-output", str(ROOT), "-W", "-n", "--keep-going", "--all", "--builder", builder]
    program = str(Path(sys.executable).parent / "jupyter-book")
    done = subprocess.run([program, "build", str(STAGE), *options], capture_output=True, text=True)
    (ROOT / "_build" / "build.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        problems = [line for line in (done.stdout + done.stderr).splitlines() if re.search("WARNING|ERROR|rror:", line)]
        sys.exit("the book did not build cleanly (whole log: _build/build.log):\n" + "\n".join(problems[-20:]))


# files that no page loads: other renderers of mathematics, source maps, translations, and icons as programs (pages use the icon font)
_UNUSED = re.compile(
    r"mathjax/(?!tex-chtml\.js$|input/tex/extensions/|output/chtml/fonts/).*|.*\.map|locales/.*|vendor/fontawesome/.*(?:\.js|\.ttf|\.txt)"
)
# in a page: the icon programs, and fonts of icons that no page shows
_UNUSED_IN_PAGE = re.compile(
    r"\s*<(?:script|link)\b[^>]*fontawesome/[^>]*(?:\.js|fa-brands-400\.woff2|fa-regular-400\.woff2)[^>]*>(?:</script>)?"
)
_MATHEMATICS = re.compile(r"\s*<script\b[^>]*/mathjax/[^>]*></script>")


def finish(html: Path = HTML) -> None:
    """Group the columns of tables, and remove files of the theme that no page needs (25 of 39 MB; each page would load 1.5 MB of them)."""
    static = html / "_static"
    for file in sorted(static.rglob("*"), reverse=True):
        if file.is_file() and _UNUSED.fullmatch(file.relative_to(static).as_posix()):
            file.unlink()
        elif file.is_dir() and not any(file.iterdir()):
            file.rmdir()
    for page in html.rglob("*.html"):
        text = group_columns(_UNUSED_IN_PAGE.sub("", page.read_text(encoding="utf-8")))
        text = text if 'class="math' in text else _MATHEMATICS.sub("", text)
        page.write_text(
            text if text.lstrip().lower().startswith("<!doctype") else f"<!DOCTYPE html>\n{text}", encoding="utf-8"
        )


def group_columns(text: str) -> str:
    """Group the columns of each measure under its name, in the heads of a page's tables."""

    def grouped(match: re.Match[str]) -> str:
        titles = re.findall(r"<th\b[^>]*><p>(.*?)</p></th>", match[0])
        measures = [_MEASURE.fullmatch(title) for title in titles]
        groups = [(name, list(of)) for name, of in itertools.groupby(measures, lambda measure: measure and measure[1])]
        if max((len(of) for name, of in groups if name), default=0) < 2:
            return match[0]
        upper, lower, rest = "", "", iter(titles)
        for name, of in groups:
            columns = [next(rest) for _ in of]
            if name:
                upper += f'<th class="head group" colspan="{len(of)}" scope="colgroup"><p>{_MEASURES[name]}</p></th>'
                lower += "".join(f'<th class="head"><p>{measure[2]}</p></th>' for measure in of)
            else:
                upper += "".join(f'<th class="head" rowspan="2"><p>{title}</p></th>' for title in columns)
        return f'<thead>\n<tr class="row-odd">{upper}</tr>\n<tr class="row-odd">{lower}</tr>\n</thead>'

    return re.sub(r"<thead>.*?</thead>", grouped, text, flags=re.S)


def check() -> None:
    """Exit if a chapter has no page, or if a page loads anything from outside the site."""
    missing = [page for page in pages() if not (HTML / f"{page}.html").is_file()]
    if missing:
        sys.exit(f"pages missing from the site: {', '.join(missing)}")
    outside = re.compile(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(https?://[^"]+)"')
    for page in HTML.rglob("*.html"):
        if loaded := outside.search(page.read_text(encoding="utf-8")):
            sys.exit(f"{page.relative_to(HTML)} loads {loaded[1]}: the site must read offline")


if __name__ == "__main__":
    stage({page: Path(notebook) for page, _, notebook in (argument.partition("=") for argument in sys.argv[1:])})
    render()
    finish()
    check()
    print(f"the book: {HTML / 'index.html'}")
