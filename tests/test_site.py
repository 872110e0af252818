"""The built site in a browser without network (run after `make book`; `.ci/run` does)."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--virtual-time-budget=15000"]  # fmt: skip
pytestmark = pytest.mark.browser


def chapters() -> list[str]:
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text())
    return [contents["root"], *(chapter["file"] for part in contents["parts"] for chapter in part["chapters"])]


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
