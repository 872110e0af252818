"""The built site in a browser without network (run after `make book`; `.ci/run` does)."""

import gzip
import html
import json
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from urllib.parse import unquote

import html5lib
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--virtual-time-budget=15000"]  # fmt: skip
pytestmark = pytest.mark.browser


def chapters() -> list[str]:
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text())
    chapters = [chapter for part in contents["parts"] for chapter in part["chapters"]]
    return [
        contents["root"],
        *(page["file"] for chapter in chapters for page in (chapter, *chapter.get("sections", ()))),
    ]


def rendered(page: str, profile: Path) -> str:
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    assert browser, "install chromium to run the browser tests"
    command = [browser, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", f"file://{HTML / page}.html"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.parametrize("page", chapters())
def test_pages_read_offline(page, tmp_path):
    dom = rendered(page, tmp_path)
    assert "<h1>" in dom and len(dom) > 4000
    body = re.sub(r"<(script|style|pre|code)\b.*?</\1>", "", dom, flags=re.S)
    text = re.sub(r"<[^>]+>", " ", body)
    assert not re.search(r"\{\{|\}\}|```|:name:|\{table\}|Traceback|\\\[|\\\(", text), (
        "raw markup or an error on the page"
    )


def test_equations_are_set(tmp_path):
    dom = rendered("book/method", tmp_path)
    assert dom.count("<mjx-container") >= 10


def test_the_run_of_this_machine_is_in_the_book(tmp_path):
    dom = rendered("book/own_run", tmp_path)
    assert "Texts generated again on this machine" in dom and "GRACE" in dom


def test_cases_of_csne_are_in_a_book_that_is_built_here(tmp_path):
    dom = rendered("results/notebooks/benchmark", tmp_path)
    assert dom.count("nearest neighbour</td>") == 6


# presses and chooses as a reader does, and writes down what is then on the page
READER = """
<script>
addEventListener("load", async () => {
  const seen = {}, board = document.getElementById("clme-leaderboard");
  const find = (selector) => board.querySelector(selector);
  const until = async (there) => { for (let n = 0; n < 200 && !there(); n++) await new Promise((done) => setTimeout(done, 20)); };
  const column = (name) => [...board.querySelectorAll(`.leaderboard-scroll tbody tr`)].map((row) => row.children[name].textContent);
  const choose = (name, value) => { const list = find(`[data-filter=${name}]`); list.value = value; list.dispatchEvent(new Event("change")); };
  await until(() => find("tbody tr"));
  seen.rows = column(0).length;
  seen.plainHidden = document.getElementById("clme-leaderboard-plain").hidden;
  choose("subject", "smollm2-135m"); choose("dataset", "CNLE"); choose("preset", "clean");
  seen.filtered = column(2);
  find("[data-sort=generalization_em]").click();
  seen.focused = document.activeElement.dataset.sort;
  seen.sorted = column(2);
  seen.order = find("[data-sort=generalization_em]").parentElement.getAttribute("aria-sort");
  find(".leaderboard-scroll tbody button").click();
  await until(() => find(".leaderboard-cases tbody tr"));
  seen.cases = board.querySelectorAll(".leaderboard-cases tbody tr").length;
  seen.heading = document.activeElement.textContent;
  find(".leaderboard-cases tbody button").click();
  await until(() => find(".leaderboard-cases h3"));
  seen.editors = [...board.querySelectorAll(".leaderboard-cases h3")].map((title) => title.textContent);
  seen.target = find(".leaderboard-cases dl").textContent.includes("Intent:");
  document.body.replaceChildren();
  document.body.append(JSON.stringify(seen));
});
</script>
"""


def built() -> list[Path]:
    """The book's pages, without the copies of some that other tests make while they run, perhaps at the same time."""
    return [file for file in HTML.rglob("*.html") if "-read" not in file.stem]


def test_the_leaderboard_sorts_filters_and_opens_cases(tmp_path):
    page = (HTML / "book" / "leaderboard.html").read_text()
    copy = HTML / "book" / "leaderboard-read.html"
    try:
        copy.write_text(page.replace("</body>", READER + "</body>"))
        dom = rendered("book/leaderboard-read", tmp_path)
    finally:
        copy.unlink()
    seen = json.loads(html.unescape(re.search(r"<body[^>]*>(\{.*\})", dom, re.S)[1]))
    assert seen["rows"] > 40 and seen["plainHidden"] is True
    names = [
        "unedited",
        "FT-L",
        "ROME",
        "MEMIT",
        "PMET",
        "MALMEN",
        "GRACE",
        "A-GRACE",
        "A-GRACE w/o CL",
        "A-GRACE w/o Mean",
        "in context",
        "in context (retrieved)",
    ]
    assert seen["filtered"] == names
    assert seen["sorted"][0] == "MALMEN" and sorted(seen["sorted"]) == sorted(names) and seen["order"] == "descending"
    assert seen["focused"] == "generalization_em" and "MALMEN" in seen["heading"]
    assert seen["cases"] == 100 and seen["editors"][0] == "MALMEN" and "unedited" in seen["editors"] and seen["target"]


def test_without_javascript_the_leaderboard_is_a_table():
    page = (HTML / "book" / "leaderboard.html").read_text()
    plain = page.split('id="clme-leaderboard-plain"')[1]
    assert plain.count("<tr") > 40 and "MALMEN" in plain


# a page in one of the two themes, and what axe-core finds on it that keeps somebody from reading it
LOOKED_THROUGH = """
<script>{axe}</script>
<script>
addEventListener("load", async () => {
  document.documentElement.dataset.theme = document.documentElement.dataset.mode = "{theme}";
  const part = document.querySelector("main") || document.body;
  await new Promise((done) => setTimeout(done, 1500));
  const seen = await axe.run(part, {resultTypes: ["violations"]});
  const grave = seen.violations.filter((each) => ["serious", "critical"].includes(each.impact));
  const told = grave.map((each) => [each.id, each.help, each.nodes.slice(0, 3).map((node) => node.html.slice(0, 200))]);
  document.body.replaceChildren();
  document.body.append(JSON.stringify(told));
});
</script>
"""
MAIN_PAGES = ["book/intro", "results/notebooks/scorecard", "book/leaderboard", "results/notebooks/rq1_proficiency", "results/notebooks/rq3_a_grace",
              "book/method"]  # fmt: skip


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("page", MAIN_PAGES)
def test_pages_can_be_read_by_everybody(page, theme, tmp_path):
    axe = (files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8")
    script = LOOKED_THROUGH.replace("{axe}", axe).replace("{theme}", theme)
    copy = HTML / f"{page}-read-{theme}.html"
    try:
        copy.write_text((HTML / f"{page}.html").read_text().replace("</body>", script + "</body>"))
        dom = rendered(f"{page}-read-{theme}", tmp_path)
    finally:
        copy.unlink()
    assert json.loads(html.unescape(re.search(r"<body[^>]*>(\[.*\])", dom, re.S)[1])) == []


def test_every_link_within_the_site_leads_somewhere():
    ids = {}
    for file in built():
        ids[file.resolve()] = set(re.findall(r'\bid="([^"]+)"', file.read_text(encoding="utf-8")))
    broken = []
    for file in ids:
        text = re.sub(r"<(script|style)\b.*?</\1>", "", file.read_text(encoding="utf-8"), flags=re.S)
        for address in re.findall(r'<a\b[^>]*\bhref="([^"]+)"', text):
            path, _, anchor = html.unescape(address).partition("#")
            if re.match(r"[a-z]+:", path):
                continue
            target = (file.parent / unquote(path)).resolve() if path else file
            if not target.exists() or (anchor and target in ids and unquote(anchor) not in ids[target]):
                broken.append(f"{file.relative_to(HTML)}: {address}")
    assert not broken, broken[:10]


def test_every_page_is_valid_html():
    pages = [file for file in built() if file.parent.name != "_static"]  # the theme's there are parts of pages
    wrong = {}
    for file in pages:
        parser = html5lib.HTMLParser()
        parser.parse(file.read_text(encoding="utf-8"))
        if parser.errors:
            wrong[str(file.relative_to(HTML))] = parser.errors[:3]
    assert not wrong and len(pages) > len(chapters())


def test_a_cell_without_a_value_has_a_dash():
    wrong = {
        page: cells
        for page in chapters()
        if (
            cells := re.findall(
                r"<t[dh][^>]*>(?:\s|<\w+>)*(nan|None|NaT)\b", (HTML / f"{page}.html").read_text("utf-8")
            )
        )
    }
    assert not wrong


def test_a_page_weighs_less_than_a_megabyte():
    """With its styles, scripts, pictures and fonts, as a server sends them (compressed); without those of other pages and the search."""
    heavy, weighed = {}, 0
    for page in chapters():
        file = HTML / f"{page}.html"
        loaded = {file}
        for tag in re.findall(r"<(?:script|link|img)\b[^>]*>", file.read_text(encoding="utf-8")):
            address = re.search(r'\b(?:src|href)="([^"#?]+)', tag)
            part = (file.parent / unquote(address[1])).resolve() if address else file
            if part.is_file() and part.suffix != ".html":
                loaded.add(part)
        weighed += len(loaded)
        size = sum(
            len(part.read_bytes() if part.suffix in (".woff2", ".png") else gzip.compress(part.read_bytes()))
            for part in loaded
        )
        if size > 1e6:
            heavy[page] = size
    assert not heavy and weighed > 10 * len(chapters())
