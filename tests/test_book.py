"""The book's pages: their sentences follow the records, their numbers come from a file, and a copied notebook builds."""

import ast
import html
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jupytext
import matplotlib.pyplot as plt
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from scorers import BY_WORDS
from test_rq4 import many
from test_text import PIECES, literal

import clme_lib
from clme_lib.datasets import embedded_csne, registry
from clme_lib.datasets.cases import Case
from clme_lib.datasets.construction import pipeline, rephrasing
from clme_lib.evaluation.records import UNSCORED
from clme_lib.metrics.base import MEASURES
from clme_lib.study import numbers, rq4, run_folder, runs
from clme_lib.study.config import ReportConfig
from clme_lib.study.rq2 import measure
from clme_lib.study.tables import Table

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "results" / "runs" / "smollm2-135m"
# what no text of others may become within a notebook's outputs
ACTIVE = ", ".join(
    f".cell_output {tag}"
    for tag in ("script", "h1", "iframe", "a:not(.headerlink)", ".math", ".admonition", ".output_area", "[onclick]")
)
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))


@pytest.fixture
def outputs_of(monkeypatch):
    """Runs a notebook's cells here and returns what they show."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(plt, "show", plt.close)

    def displayed(name: str, /, **parameters) -> list:
        shown, namespace = [], {}
        monkeypatch.setattr("IPython.display.display", shown.append)
        for cell in jupytext.read(ROOT / "notebooks" / f"{name}.py").cells:
            if cell.cell_type == "markdown":
                continue
            body = ast.parse(cell.source).body
            last = body.pop() if isinstance(body[-1], ast.Expr) else None
            exec(compile(ast.Module(body, []), name, "exec"), namespace)
            if last:
                shown.append(eval(compile(ast.Expression(last.value), name, "eval"), namespace))
            if "parameters" in cell.metadata.get("tags", []):
                # as papermill passes them, whether the cell lists them or not
                injected = "# Parameters\n" + "".join(f"{key} = {value!r}\n" for key, value in parameters.items())
                namespace.update(parameters, In=[cell.source, injected])
        return [each for each in shown if hasattr(each, "data")]

    return displayed


@pytest.fixture
def show(outputs_of):
    """Runs a notebook's cells here and returns what they show, as Markdown."""

    def joined(name: str, /, **parameters) -> str:
        shown = outputs_of(name, **parameters)
        return "\n\n".join(each.to_myst() if isinstance(each, Table) else each.data for each in shown)

    return joined


@pytest.fixture(scope="module")
def published() -> pd.DataFrame:
    """Ten cases per dataset of the published run, unedited and by GRACE."""
    records = run_folder.load_run(RUN, editors=["none", "grace"])
    return records.groupby(["dataset", "editor"], sort=False).head(10).reset_index(drop=True)


def test_rq1_says_what_the_records_show(show, monkeypatch, published):
    def read(records: pd.DataFrame) -> str:
        monkeypatch.setattr(runs, "run", lambda config: records)
        return show("rq1_proficiency")

    cnle = published[published["dataset"] == "cnle"]
    assert "**Finding** (CNLE). Highest effectiveness: GRACE: " in read(cnle)
    grace = cnle["editor"] == "grace"
    twins = pd.concat([cnle[grace], cnle[grace].assign(editor="ft-l")])
    assert "**Finding** (CNLE). Highest effectiveness: GRACE and FT-L: " in read(twins)
    perfect = cnle[grace].assign(effectiveness_em=1.0, specificity_em=1.0, generalization_em=0.25)
    text = read(perfect)
    assert "Only GRACE has effectiveness and specificity of at least 50%; its generalization is 25.0%." in text
    assert (
        "**Example 3**" in text and f"(case {perfect['case_id'].min()})" in text and ":name: tab-rq1-transfer" in text
    )
    assert "No editor has both effectiveness and specificity of at least 50%." in read(
        cnle[grace].assign(specificity_em=0.0)
    )
    text = read(cnle.assign(state=UNSCORED))
    assert "_Nothing to read yet" in text and text.count("(nothing to show)") == 3
    text = read(cnle[cnle["editor"] == "none"])
    assert "_Nothing to read yet" in text and "**Example 1**" in text
    assert "_These records keep no texts to show._" in read(published[published["dataset"] == "csne"])


def test_the_spot_check_shows_every_difference(show, monkeypatch, published):
    changed = published.copy(deep=True)
    changed.at[0, "sha256_effectiveness"] = ["0"]
    monkeypatch.setattr(runs, "run", lambda config: published)
    for here, said in ((published, "Every text came out the same"), (changed, "\n────\n")):
        by_folder = {Path("runs/rq1"): here, RUN: published}
        monkeypatch.setattr(run_folder, "load_run", by_folder.__getitem__)
        text = show("rq1_proficiency", within=str(RUN))
        assert said in text and ":name: tab-spot-check" in text


def test_rq2_says_only_what_was_measured(show, monkeypatch):
    row = {"random_weights": True, "dtype": "bfloat16", "machine": "any", "device": "cpu", "threads": 2, "kind": "edit", "commit": "c",
           "dataset": "cnle", "base_mib": 1.0, "steps": 3, "prompt_tokens": 9, "target_tokens": 4, "phases": [], "error": None}  # fmt: skip
    seconds = {
        "small": {"malmen": 1.0, "grace": 5.0, "memit": 90.0, "pmet": 100.0},
        "large": {"malmen": 2.0, "grace": 6.0},
    }
    measured = pd.DataFrame(
        {**row, "subject": subject, "editor": editor, "seconds": value, "peak_mib": 1024 * value}
        for subject, by_editor in seconds.items()
        for editor, value in by_editor.items()
    )
    monkeypatch.setattr(measure, "bench", lambda config: measured)
    text = show("rq2_efficiency")
    assert "an edit takes from 1 s (MALMEN) to 100 s (PMET) on CNLE" in text
    assert "of the 1 pairs of subject and dataset in which all three were measured, MALMEN is the fastest in 1" in text
    assert "by the editors measured on all, large has the largest median time and memory." in text
    assert "The largest peak in 16 bits is 100.0 GiB (PMET on small (random weights, bfloat16))." in text
    assert "Nothing of this was measured on a GPU." in text and "take longer" not in text and "Did not fit" not in text
    failed = {**row, "kind": "setup", "subject": "large", "editor": "rome", "error": "out of memory"}
    measured = pd.concat([measured[measured["editor"] == "grace"].assign(device="cuda"), pd.DataFrame([failed])])
    text = show("rq2_efficiency")
    assert "- Did not fit into the device's memory: ROME on large (random weights, bfloat16)." in text
    assert "MALMEN fastest" not in text and "Nothing of this" not in text


@pytest.mark.slow
def test_rq3_says_what_the_tables_show(show):
    parameters = {"out": str(RUN), "name": RUN.name, "cases": 10, "dataset": "cnle"}
    text = show("rq3_a_grace", **parameters)
    assert "On the 10 CNLE cases that all variants edited" in text and "% of the same cases." in text
    assert "On CNLE with GRACE's keys, the rephrased prompt is nearer than every neighbour in" in text
    assert re.search(r"GRACE at its best radius \(\d+\.\d\d\) generalizes in", text)
    assert "So on these cases no radius of GRACE's does what the encoder does. On CSNE" in text
    assert text.count("does without an encoder what A-GRACE does") == 1, "on CSNE a tuned radius reaches A-GRACE's best"
    assert "_GRACE and A-GRACE are needed" in show("rq3_a_grace", **parameters, editors="none,grace")


def test_rq4_says_what_is_left(show, monkeypatch):
    records = many(lambda position, turn: position < 30 or turn >= 24, 30).assign(subject="small")
    monkeypatch.setattr(rq4, "run_many", lambda config: records)
    text = show("rq4_many_edits")
    assert "- **one after another**: GRACE 20.0% and 50.0% (30 edits)." in text
    # where the editor ends, and folded all states
    ends, states = text.index(":name: tab-rq4-retention"), text.index(":name: tab-rq4-states")
    assert "| 30 | 30 | 20.0 (" in text[ends:states] and "| 10 | 10 |" not in text[ends:states]
    assert "| 10 | 10 | 100.0 (" in text[states:] and "No cases were held out of these runs" in text


def test_another_subject_stands_beside_the_run(show, monkeypatch, published, tmp_path):
    other = published.assign(subject="another")
    monkeypatch.setattr(clme_lib, "run", lambda config: published, raising=False)
    # of the run's own folder, editors that only the other subject's run shows
    monkeypatch.setattr(
        clme_lib, "load_run", lambda folder, editors=None: other if editors is None else published[:0], raising=False
    )
    text = show("rq1_proficiency", beside=str(tmp_path))
    assert (
        ":name: tab-rq1-beside" in text
        and ":name: tab-rq1-subjects" in text
        and "| Eff. EM, smollm2-135m | Eff. EM, another |" in text
    )
    assert "tab-rq1-subjects" not in show("rq1_proficiency")
    assert "beside" not in run_folder._described(ReportConfig(beside=tmp_path))


def test_the_benchmark_chapter_shows_what_it_may_and_what_was_built(show, monkeypatch, tmp_path, cases):
    built = tmp_path / "built"
    pipeline.build_cnle(built, "embedded", BY_WORDS, rephrasing.GIVEN_INTENTS, targets=4, seed=1)
    load_cases = registry.load_cases
    monkeypatch.setattr(embedded_csne, "is_mined", lambda: True)
    monkeypatch.setattr(registry, "load_cases", lambda name: load_cases(name) if name == "cnle" else cases)
    published = show("benchmark")
    assert "not ours to publish" in published and "sort list" not in published and "| CSNE |" in published
    assert "the embedded pairs by the offline scorer" in published and "683 and" not in published
    local = show("benchmark", samples_of="cnle,csne", builds=str(built))
    assert "not ours to publish" not in local and "sort list" in local
    assert "those of built" in local and "| CNLE (built) |" in local
    assert all(case.target in html.unescape(local) for case in pipeline.built_cases(built)[:3])


def _markdown_of(cell: dict) -> str:
    return "\n".join("".join(output.get("data", {}).get("text/markdown", "")) for output in cell.get("outputs", []))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_executed_notebooks_are_their_sources(source):
    """Nothing but the parameters differs, and nothing failed; the benchmark chapter shows no text of CSNE."""
    executed = json.loads((ROOT / "results" / "notebooks" / f"{source.stem}.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in executed["cells"] if "injected-parameters" not in cell["metadata"].get("tags", [])]
    assert ["".join(cell["source"]) for cell in cells] == [cell.source for cell in jupytext.read(source).cells]
    assert "exception" not in executed["metadata"]["papermill"]
    captions = re.findall(r"```\{table\} (.*)", "".join(map(_markdown_of, cells)))
    assert not [caption for caption in captions if re.search(r"&#60;/?\w+&#62;", caption)], "markup shown as text"
    if source.stem == "benchmark":
        assert not executed["metadata"]["papermill"]["parameters"]
        assert "texts are not ours to publish, so" in json.dumps([cell.get("outputs") for cell in cells])


@pytest.mark.slow
def test_numbers_of_the_prose_are_the_records(tmp_path):
    for name in ("runs", "efficiency"):
        (tmp_path / name).symlink_to(ROOT / "results" / name)
    numbers.write_numbers(tmp_path)
    for name in ("numbers.json", "hyperparameters.csv", "hyperparameters_differing.csv"):
        assert (tmp_path / name).read_text() == (ROOT / "results" / name).read_text(), "run `make publish`"
    known = json.loads((tmp_path / "numbers.json").read_text())
    exact = run_folder.load_run(RUN)[lambda rows: (rows["dataset"] == "cnle") & (rows["editor"] == "grace")][
        "effectiveness_em"
    ]
    assert known["cnle_grace_effectiveness"] == f"{100 * exact.mean():.1f}%"
    used = {name for page in (ROOT / "book").glob("*.md") for name in re.findall(r"\{\{ (\w+) \}\}", page.read_text())}
    assert used and used <= set(known)


@pytest.fixture
def tree(tmp_path):
    """A small book: RQ1, a copy of it as a page of one's own, and the sections that it refers to."""
    (tmp_path / "results" / "notebooks").mkdir(parents=True)
    for folder in ("_ext", "_static"):
        shutil.copytree(ROOT / "book" / folder, tmp_path / "book" / folder)
    for file in (
        "_config.yml",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "book/build.py",
        "book/layers.py",
        "book/references.bib",
        "results/numbers.json",
    ):
        shutil.copy(ROOT / file, tmp_path / file)
    shutil.copytree(ROOT / "clme_lib", tmp_path / "clme_lib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("rq1_proficiency", "mine"):
        shutil.copy(
            ROOT / "results" / "notebooks" / "rq1_proficiency.ipynb",
            tmp_path / "results" / "notebooks" / f"{name}.ipynb",
        )
    sections = [
        "(own-run)=\n# Re-run\n\nSee {ref}`RQ1 <rq1>`.",
        "(sec-method)=\n## Method\n\n(sec-free)=\n## Free writing",
        "(weight-editors)=\n## Updates\n\n(sec-records)=\n## Records\n\n(selection)=\n## Selection\n\n(sec-threats)=\n## Threats",
    ]
    (tmp_path / "book" / "own_run.md").write_text("\n\n".join(sections))
    pages = ["results/notebooks/rq1_proficiency", "results/notebooks/mine"]
    chapters = "\n".join(f"  - file: {page}" for page in pages)
    (tmp_path / "_toc.yml").write_text(f"format: jb-book\nroot: book/own_run\nchapters:\n{chapters}\n")
    return tmp_path


@pytest.fixture
def build(tree, monkeypatch):
    """The small book's build, in this process."""
    monkeypatch.syspath_prepend(tree / "book")
    spec = importlib.util.spec_from_file_location("build", tree / "book" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_copied_notebook_builds(tree):
    done = subprocess.run([sys.executable, str(tree / "book" / "build.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    html = tree / "_build" / "html" / "results" / "notebooks"
    original, copy = ((html / f"{name}.html").read_text() for name in ("rq1_proficiency", "mine"))
    assert 'id="tab-rq1-transfer"' in original and 'id="tab-rq1-transfer-results-notebooks-mine"' in copy
    assert 'id="tab-rq1-transfer"' not in copy
    (head,) = re.findall(r'id="tab-rq1-proficiency".*?<thead>(.*?)</thead>', original, re.S)
    groups = re.findall(r'colspan="(\d)" scope="colgroup"><p>(\w+)', head)
    assert groups == [("3", "Effectiveness"), ("3", "Generalization"), ("4", "Specificity")]
    assert head.count("<p>EM</p>") == 3 and head.count('rowspan="2"') == 4, "every column has a title"
    assert "notebooks/rq1_proficiency.html#rq1" in (tree / "_build" / "html" / "book" / "own_run.html").read_text()


@pytest.mark.slow
def test_hostile_texts_are_shown_literally_and_do_nothing(tree, outputs_of, monkeypatch, published):
    """A dataset, records, an editor and a subject of which every text would run, load or break out, through to the page."""
    canary = tree / "canary"
    command = "{{ cycler.__init__.__globals__.os.system('touch " + str(canary) + "') }}"
    outbreak = (
        f"\n\n# Injected heading\n\n{command}\n\n<script>injected</script>\n\n```{{raw}} html\n<h1>Injected</h1>\n```\n"
    )
    texts = [
        f"{fence}{outbreak}"
        for fence in ("`" * 4, "`" * 9, "~~~", "</code></pre>", "\n \n", "\n\t\n", "\r", "\u2028", "$$", "|")
    ]
    texts += [" ".join(PIECES), "".join(reversed(PIECES))]
    rows = published.groupby(["dataset", "editor"], sort=False).head(3)
    cases = [
        Case(int(number), "cnle", *texts[first : first + 2], (texts[first + 2],), (texts[first + 3],) * 5)
        for number, first in zip(rows[rows["dataset"] == "cnle"]["case_id"].unique(), (0, 4, 8))
    ]
    written = {
        f"generated_{name}": [[text] * (5 if name == "specificity" else 1) for text in (texts * 2)[n:][: len(rows)]]
        for n, name in enumerate(MEASURES)
    }
    rows = rows.assign(**written, subject=texts[0], editor=rows["editor"].replace({"grace": texts[1]}))
    changed = rows.assign(sha256_effectiveness=[["0"]] * len(rows))
    monkeypatch.setattr(runs, "run", lambda config: rows)
    monkeypatch.setattr(registry, "load_cases", lambda name, source: cases)
    monkeypatch.setattr(run_folder, "load_run", {Path("runs/rq1"): rows, RUN: changed}.__getitem__)
    bundles = [
        each._repr_mimebundle_() if isinstance(each, Table) else {"text/markdown": each.data}
        for each in outputs_of("rq1_proficiency", within=str(RUN))
    ]
    page = tree / "results" / "notebooks" / "rq1_proficiency.ipynb"
    notebook = json.loads(page.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and "figure" not in str(cell["metadata"]):
            cell["outputs"] = []
    outputs = [{"output_type": "display_data", "metadata": {}, "data": bundle} for bundle in bundles]
    shown = {
        "cell_type": "code",
        "id": "hostile",
        "metadata": {},
        "source": "...",
        "execution_count": 1,
        "outputs": outputs,
    }
    notebook["cells"].append(shown)
    page.write_text(json.dumps(notebook), encoding="utf-8")
    (tree / "_toc.yml").write_text(
        "format: jb-book\nroot: book/own_run\nchapters:\n  - file: results/notebooks/rq1_proficiency\n"
    )
    done = subprocess.run([sys.executable, str(tree / "book" / "build.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = (tree / "_build" / "html" / "results" / "notebooks" / "rq1_proficiency.html").read_text(encoding="utf-8")
    article = BeautifulSoup(built, "html.parser").find("article")
    codes = [code.get_text() for code in article.select("code[dir=ltr]")]
    for case in cases:
        assert {literal(case.prompt, "\n"), literal(case.target, "\n")} <= set(codes)
        assert {literal(case.rephrased[0].strip()), literal(case.unrelated[0].strip())} <= set(codes)
    for column in written.values():
        assert {literal(text.strip()) for text, *_ in column[:6]} <= set(codes), "the examples are of CNLE"
    assert {literal(text, "\n") for (text,) in written["generated_effectiveness"]} <= set(codes), "the spot check's"
    assert literal(texts[0]) in article.find("caption").get_text()
    assert literal(texts[1].upper()) in [cell.get_text() for cell in article.select("td")]
    assert not canary.exists() and not article.select(ACTIVE)
    assert not [heading for heading in article.select("h1, h2, h3, h4") if "njected" in heading.get_text()]


@pytest.mark.parametrize(
    "bundle",
    [
        {"text/html": "<p><script>x</script></p>"},
        {"text/html": ["<img src='x'\n", " onerror=x>"]},
        {"text/markdown": "<iframe src='x'></iframe>"},
        {"text/markdown": "```{raw} html\nx\n```"},
        {"application/javascript": "x"},
    ],
)
def test_an_output_that_does_something_is_refused(tree, build, bundle):
    notebook = tree / "results" / "notebooks" / "mine.ipynb"
    content = json.loads(notebook.read_text(encoding="utf-8"))
    content["cells"][-1].update(outputs=[{"output_type": "display_data", "metadata": {}, "data": bundle}])
    notebook.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(SystemExit, match=f"notebooks/mine: an output of cell {len(content['cells']) - 1} holds"):
        build.stage({})


@pytest.mark.slow
def test_a_number_that_is_unknown_fails_the_build(tree):
    with open(tree / "book" / "own_run.md", "a", encoding="utf-8") as page:
        page.write("\n\n{{ no_such_number }}\n")
    done = subprocess.run([sys.executable, str(tree / "book" / "build.py")], capture_output=True, text=True)
    assert (
        done.returncode == 1 and "{{ no_such_number }}: results/numbers.json has no number of that name" in done.stderr
    )


def test_labels_follow_within_their_page(tree, build):
    """References to a label that was renamed follow it; those to other pages and code that has the same word stay."""
    own = tree / "own.ipynb"
    shutil.copy(tree / "results" / "notebooks" / "mine.ipynb", own)
    notebook = json.loads(own.read_text())
    notebook["cells"][0]["source"] += (
        "\n\nSee [](#rq1), {numref}`tab-rq1-transfer`, {ref}`its rq1 <rq1>`, `runs/rq1`, {ref}`sec-method`."
    )
    own.write_text(json.dumps(notebook))
    build.stage({"results/notebooks/mine": own})
    first = "".join(json.loads((build.STAGE / "results/notebooks/mine.ipynb").read_text())["cells"][0]["source"])
    new = "results-notebooks-mine"
    assert first.startswith(f"(rq1-{new})=\n# RQ1: Proficiency\n")
    assert (
        f"See [](#rq1-{new}), {{numref}}`tab-rq1-transfer-{new}`, {{ref}}`its rq1 <rq1-{new}>`, `runs/rq1`, {{ref}}`sec-method`."
        in first
    )
    # in another page's place a notebook takes that page's label and title
    build.stage({"book/own_run": own})
    taken = build.STAGE / "book" / "own_run.ipynb"
    assert "".join(json.loads(taken.read_text())["cells"][0]["source"]).startswith("(own-run)=\n# Re-run\n")
    assert not taken.with_suffix(".md").exists() and (tree / "book" / "own_run.md").exists()
    with pytest.raises(SystemExit, match="book/nowhere: no page of _toc.yml"):
        build.stage({"book/nowhere": own})


def test_no_caption_ends_its_own_fence():
    """A fence of back-quotes with another one in its first line is no fence, and nothing warns of it."""
    pages = [*ROOT.glob("book/*.md"), *ROOT.glob("notebooks/*.py"), *ROOT.glob("*.md")]
    broken = re.compile(r"^(?:# )?```+\{[^\n]*`", re.M)
    assert broken.search("# ```{csv-table} Of {cite:p}`a`.")
    assert not [(page.name, line[0]) for page in pages if (line := broken.search(page.read_text(encoding="utf-8")))]
