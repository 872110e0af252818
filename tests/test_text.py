"""Text is data: what a dataset, a model or a file says is shown literally, by every table, example, page and terminal."""

import html
import io
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import hypothesis.strategies as st
import matplotlib.pyplot as plt
import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from markdown_it.renderer import RendererHTML
from myst_parser.config.main import MdParserConfig
from myst_parser.parsers.mdit import create_md_parser

from clme_lib import cli
from clme_lib.datasets.cases import Case
from clme_lib.metrics.base import MEASURES
from clme_lib.metrics.executes import EXECUTION_METRICS
from clme_lib.study import benchmark, conflicts, interference, numbers, rq1, rq4, run_folder, scorecard, spot_check
from clme_lib.study.appendices import encoder_settings, lookups, selection, statistics, weight_updates
from clme_lib.study.rq2 import tables as rq2
from clme_lib.study.rq3 import tables as rq3
from clme_lib.study.tables import Table, cells, score_rows, table, to_markdown
from clme_lib.support.display import EMPTY, Markup, code_block, inline, inline_code, printable

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "results" / "runs" / "smollm2-135m"
EXTENSIONS = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["parse"]["myst_enable_extensions"]
PIECES = [
    *("`", "``", "```", "````", "`````````", "~~~~", "```{raw} html\n", "{raw}`x`", "{ref}`rq1`", ":::{note}\n", ":::", "(rq1)="),
    *("{{ 7*7 }}", "{{", "}}", "{%", "%}", "{#", "<script>", "</code></pre>", "</td>", "<!--", "<b onclick=x>", "&lt;", "&#60;", "&"),
    *("$", "$$", "$x^2$", "\\(x\\)", "\\[x\\]", "\\begin{align}x\\end{align}", "\\", "|", "*", "**a**", "_", "_a_", "[a](b)", "![", "]:"),
    *("\r", "\r\n", "\n", "\n\n", "\n \n", "\n\t\n", "\t", " ", "    ", "\n# h", "\n- x", "1. ", "1)", "- ", "+ ", "---", "===", "% ", ": "),
    *("\u2028", "\u2029", "\x85", "\x00", "\x1b[31m", "\x1b]0;t\x07", "\x9b", "\x7f", "\u202e", "\u200f", "\u2066", "\ufeff", "\ufffe"),
    *("https://example.org", "www.example.org", "a@example.org", "\n:name: x", "+++", "^", "~", "'", '"', "=", "#", "@", ">", "é", "日"),
]  # fmt: skip
HOSTILE = st.lists(st.sampled_from(PIECES) | st.text(min_size=1, max_size=3), min_size=1, max_size=6).map("".join)
# what the library's own markup consists of, as HTML and as markdown-it's tokens
OUR_TAGS = {"code", "pre", "strong", "small", "br", "table", "tbody", "tr", "td"}
OUR_TOKENS = {"text", "inline", "html_inline", "html_block", "paragraph_open", "paragraph_close", "strong_open", "strong_close"} | {
    f"{part}_{end}" for part in ("table", "thead", "tbody", "tr", "th", "td") for end in ("open", "close")
}  # fmt: skip
PARSER = create_md_parser(MdParserConfig(enable_extensions=EXTENSIONS), RendererHTML)
# what fails is short already
many = settings(max_examples=40, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))


def literal(text: str, line_break: str = "⏎") -> str:
    """What a reader sees of a text: all of it, with what no page can hold written out."""
    seen = []
    for character in text:
        number = ord(character)
        nothing = (
            unicodedata.category(character) in ("Cc", "Cs") or 0xFDD0 <= number < 0xFDF0 or number & 0xFFFE == 0xFFFE
        )
        seen.append(character if character == "\t" or not nothing else ascii(character)[1:-1])
    return "".join(line_break if character == "\n" else shown for character, shown in zip(text, seen))


def visible(markdown: str, links: int = 0) -> list[str]:
    """The texts that a page shows of Markdown in the book's dialect; fails when there is any markup that is not the library's, or another
    number of links to labels."""
    texts, targets = [], []
    for token in PARSER.parse(markdown):
        assert token.type in OUR_TOKENS, f"{token.type}: {token.content!r} in {markdown!r}"
        if token.type == "html_block":
            texts += html_texts(token.content)
        elif token.type == "inline":
            targets += [part.attrs["href"] for part in token.children if part.type == "link_open"]
            for part in token.children:
                assert part.type in OUR_TOKENS | {"link_open", "link_close"}, (
                    f"{part.type}: {part.content!r} in {markdown!r}"
                )
                assert part.type != "html_inline" or tags(part.content) <= OUR_TAGS, markdown
            texts.append("".join(part.content for part in token.children if part.type == "text"))
    assert len(targets) == links and all(target.startswith("#") for target in targets), targets
    return texts


def tags(markup: str) -> set[str]:
    return set(re.findall(r"<\s*/?\s*([^\s>/]+)", markup))


def html_texts(markup: str) -> list[str]:
    assert tags(markup) <= OUR_TAGS, markup
    return [html.unescape(text) for text in re.split(r"<[^<>]*>", markup)]


@many
@given(text=HOSTILE | st.text(st.characters(categories=["Cs", "Cc", "Cf", "Zs", "Po"])))
def test_shown_text_parses_back_to_the_text(text):
    in_code = text.strip() or EMPTY
    assert html.unescape(inline(text)) == literal(text)
    for markup in (inline(text), inline_code(text), code_block(text)):
        assert markup.splitlines() in ([markup], []), "it stays on one line of the source"
    # in a sentence, at the beginning of one, alone
    assert visible(f"a {inline(text)} b") == [f"a {literal(text)} b"]
    assert visible(f"{inline(text)}b") == [f"{literal(text)}b"]
    assert "".join(visible(f"{inline(text)}")) == literal(text)
    assert visible(f"a {inline_code(text)}") == [f"a {literal(in_code)}"]
    assert "".join(visible(code_block(text))) == literal(text or EMPTY, line_break="\n")
    assert visible(f"a\n\n{code_block(text)}\n\nb")[0] == "a"
    shown = printable(text)
    assert all(character.isprintable() or character in "\n\t" for character in shown)


def test_markup_of_ours_is_shown_as_it_is_and_nothing_derived_from_it():
    ours = Markup("<b>x</b>")
    assert inline(ours) is ours and isinstance(inline("<"), Markup)
    assert inline(ours + "<") == inline("<b>x</b><") != ours + "<"
    shown = Table(cells([{"a": ours, "b": "<i>"}]), Markup("<em>y</em>"), "tab")
    assert "| <b>x</b> | &#60;i&#62; |" in shown.to_myst() and "{table} <em>y</em>\n" in shown.to_myst()
    bundle = shown._repr_mimebundle_()
    assert "<td><b>x</b></td>" in bundle["text/html"] and "<td>&#60;i&#62;</td>" in bundle["text/html"]


@pytest.fixture(scope="module")
def records() -> pd.DataFrame:
    """Two cases of each dataset and editor that RQ1 and RQ3 compare."""
    editors = ["none", "grace", "a-grace", "a-grace-wo-cl", "a-grace-wo-mean"]
    return run_folder.load_run(RUN, editors=editors).groupby(["dataset", "editor"], sort=False).head(2)


PLACE = {"random_weights": True, "device": "cuda", "threads": 1, "base_mib": 1.0, "peak_mib": 2.0, "steps": 3, "prompt_tokens": 9,
         "target_tokens": 4, "phases": [["solve", 1.0, 1.0]], "seconds": 1.0, "error": None, "batch": 1.0, "edit_seconds": 1.0,
         "evaluate_seconds": 1.0, "operations_per_second": 1e9, "bytes_per_second": 1e9, "measured": "2026-11-01"}  # fmt: skip
ENCODER = {"editor": "a-grace", "margin": 1.0, "selection": "training", "patience": 5, "held_out": 1.0, "accuracy": 1.0, "best": 1.0,
           "best_radius": 1.0, "inside": 1.0, "neighbours_inside": 1.0}  # fmt: skip
UPDATES = {"values": "subject", "cases": 1, "learnt": 1.0, "nll_before": 1.0, "nll_after": 1.0, "first_before": 1.0, "first_after": 1.0,
           "norm": 1.0, "reach": 1.0, "attention learnt": True, "weight": 1.0}  # fmt: skip
SETTING = {"cases": 1, "effectiveness_em": 1.0, "generalization_em": 1.0, "specificity_rate": 1.0, "loss": 1.0, "criterion": 1.0,
           "chosen": True, "dataset": "cnle", "released_budget_em": 1.0}  # fmt: skip
COUNTS = {"tokens": 1, "layer": 1, "cases": 1, "cosine": 1.0, "share": 1.0, "share_of_four": 1.0, "difference": 1.0}
FAILING = [name for name in EXECUTION_METRICS if name.startswith("fails_")]
START = {
    "started": "2026-11-23T08:26:00",
    "id": "0",
    "versions": {"torch": "2", "transformers": "5"},
    "hyperparameters": {"grace": {}},
}


def tables_of(text: str, records: pd.DataFrame) -> dict[str, tuple[Table, list[str]]]:
    """Every table of the library with a text in place of each name that a file, a model or a machine may give; and what it then shows."""
    named, edited = records.assign(dataset=text), records.assign(editor=text)
    kinds = pd.DataFrame([{**PLACE, "kind": kind, "editor": "grace", **dict.fromkeys(("subject", "dtype", "machine", "commit", "dataset"), text)}
                          for kind in ("edit", "setup", "throughput", "ceiling")])  # fmt: skip
    study = pd.DataFrame([{**PLACE, "kind": "throughput", "subject": "codellama-7b", "dtype": text, "machine": text, "dataset": dataset,
                           "editor": editor} for dataset, editor in rq2._PAIRS])  # fmt: skip
    measured = pd.DataFrame(
        [{**ENCODER, "dataset": text, "architecture": text, "cases": count} for count in (100, 200, 400)]
    )
    places = pd.DataFrame([{"dataset": text, "query": "last", "kind": kind, "case_id": 1, "distance": 1.0}
                           for kind in ("rephrased", "neighbour")])  # fmt: skip
    alone = pd.DataFrame(
        [
            {"dataset": text, "case_id": 1, "editor": editor, "seconds": 1.0, "peak_mib": 1.0}
            for editor in ("grace", "a-grace")
        ]
    )
    sweep = pd.DataFrame(
        [
            {
                "dataset": text,
                "editor": text,
                "margin": 1.0,
                "radius": 1.0,
                "generalization": 1.0,
                "specificity_rate": 1.0,
            }
        ]
    )
    options = {"label": "tab", "caption": text}
    lookups_row = {"editor": text, "lookup": "colon", "weight": 1.0, "ridge": 0.0, "cases": 1, "reach": 0.5, **SETTING}
    lookups_table = lookups.lookup_table(pd.DataFrame([{**lookups_row, "editor": text}]), **options)
    compared = spot_check.compare(named.assign(editor="x"), named.assign(editor="x"))
    case = Case(1, "cnle", text, text, (text,), (text,))
    grid = pd.DataFrame([{**SETTING, "setting": text, "editor": text}])
    updates = pd.DataFrame([{**UPDATES, "editor": text, "layers": text}])
    upper, commit = text.upper(), text[:10]
    return {
        "proficiency": (rq1.proficiency_table(named, **options), [text]),
        "scores": (table(score_rows)(edited, **options), [upper]),
        "free": (rq1.free_table(named.assign(stops=1.0), **options), [text]),
        "failures": (rq1.failure_table(named.assign(**dict.fromkeys(FAILING, 0.0)), **options), [text]),
        "subjects": (rq1.subjects_table(named.assign(subject=text), **options), [text, f"Eff. EM, {text}"]),
        "prompt": (rq1.prompt_table(pd.concat([named, named.assign(editor="in-context")]), **options), [text]),
        "protocol": (rq1.protocol_table(edited.assign(free_effectiveness_em=0.5), **options), [upper]),
        "reach": (rq1.reach_table(named.assign(fires=1.0, right_where_fired=0.0), **options), [text]),
        "transfer": (rq1.transfer_table(edited, **options), [upper]),
        "retention": (rq4.retention_table(named.assign(sample=0, protocol=text, turn=0), **options), [text]),
        "orders": (rq4.orders_table(pd.concat([named.assign(protocol=text, sample=n) for n in (0, 1)]), **options), [text]),
        "learning": (rq4.learning_table(named.assign(sample=0, protocol=text, turn=0, position=20, steps=5, loss=0.5), **options), [text]),
        "ability": (rq4.ability_table(named.assign(sample=0, protocol=text, held_out=True, target_loss=1.0, target_tokens=4), **options), [text]),
        "conflicts": (conflicts.conflict_table(pd.DataFrame([{"dataset": text, "editor": text, **dict.fromkeys(conflicts.SHARES, 1.0)}]), **options),
                      [text, upper]),
        "interference": (interference.interference_table(pd.DataFrame([{"dataset": text, "editor": text, "edits": 3, **dict.fromkeys(interference.MEASURED, 1.0)}]),
                                                         **options), [text, upper]),
        "ablation": (rq3.ablation_table(named, **options), [text]),
        "scorecard": (scorecard.scorecard_table({text: scorecard.Evidence(named, named[:0], alone[:0])}, **options), [text]),
        "paired": (rq3.paired_table(named, **options), [text]),
        "presets of RQ3": (rq3.preset_table(named, named.assign(preset=text), **options), [text]),
        "overhead": (rq3.overhead_table(alone, **options), [text]),
        "projection": (rq3.projection_table(places, **options), [f"{text} 1"]),
        "radius": (rq3.radius_table(sweep, **options), [text, upper]),
        "circumstances": (rq2.circumstances(kinds, **options), [text, f"{text}: 9 + 4", commit.strip() or EMPTY]),
        "cost": (rq2.cost_table(kinds, **options), [f"{text} s / edit", f"{text} peak MiB"]),
        "throughput": (rq2.throughput_table(kinds, **options), [text]),
        "whole_case_floor": (rq2.whole_case_floor_table(kinds, **options), [text]),
        "floor": (rq2.floor_table(kinds, **options), [f"{text} floor s"]),
        "ceilings": (rq2.ceiling_table(kinds, **options), [text]),
        "whole study": (rq2.projection_table(study, **options), [text]),
        "agreement": (spot_check.agreement_table(compared, **options), [text]),
        "lengths": (benchmark.length_table({text: [case]}, **options), [text]),
        "levels": (benchmark.level_table(pd.DataFrame({"level": [text], "share": 1.0, "pairs": 1}), **options), [text]),
        "encoders": (encoder_settings.setting_table(measured, **options), [text]),
        "sizes": (encoder_settings.size_table(measured, **options), [text]),
        "lookups": (lookups_table, [upper]),
        "updates": (weight_updates.diagnosis_table(updates, **options), [upper]),
        "PMET": (weight_updates.pmet_table(updates, **options), [f"{'block' if text.isdigit() else 'blocks'} {text}"]),
        "grid": (selection.selection_table(grid, label="tab"), []),
        "budgets": (selection.budget_table({text: grid}, **options), [upper]),
        "ends": (selection.end_table({text: grid.assign(**dict.fromkeys(selection.END_SCORES, 0.5))}, **options), [upper]),
        "defects": (selection.preset_table({text: grid}, **options), [text, upper]),
        "statistics": (statistics.statistics_table(pd.DataFrame([COUNTS]), **options), []),
    }  # fmt: skip


def test_every_table_is_among_them(records):
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "clme_lib").rglob("*.py"))
    # made from rows alone, from rows given by name, from a table of its own
    made = len(re.findall(r"^@table$|^\w+ = table\(|^def .*-> Table:$", source, re.M))
    assert made == len(tables_of("x", records)) - 1, "the table of scores is RQ1's as well"


@pytest.mark.slow
@settings(many, max_examples=4)
@given(text=HOSTILE)
def test_every_table_shows_text_literally(text, records):
    for name, (shown, texts) in tables_of(text, records).items():
        myst = shown.to_myst()
        head, _, body = myst.partition("\n:name: tab\n\n")
        assert body.endswith("\n```") and "\n" not in head, name
        seen = visible(body.removesuffix("\n```"), links=len(scorecard.CLAIMS) if name == "scorecard" else 0)
        assert seen.count("") < len(seen) or not texts
        for expected in texts:
            assert literal(expected) in seen, (name, seen)
        caption = head.removeprefix("```{table} ")
        assert visible(f"x {caption}") == [f"x {literal(shown.caption)}"], name
        bundle = shown._repr_mimebundle_()
        assert tags(bundle["text/html"]) <= OUR_TAGS | {"p", "em", "thead", "th"}, name
        assert f"<em>{caption}</em>" in bundle["text/html"]
        assert bundle["text/plain"] == printable(bundle["text/plain"])


@pytest.mark.slow
@many
@given(text=HOSTILE)
def test_examples_cases_and_provenance_show_text_literally(text, records):
    rows = records[(records["dataset"] == "cnle") & records["editor"].isin(["none", "grace"])]
    case = Case(int(rows["case_id"].iloc[0]), "cnle", text, text, (text,), (text,))
    rows = rows[rows["case_id"] == case.case_id]
    rows = rows.assign(**{f"generated_{name}": [[text]] * len(rows) for name in MEASURES})
    ((_, written),) = rq1.examples(rows, [case])
    assert visible(to_markdown(written)).count(literal(text.strip() or EMPTY)) == len(MEASURES) * len(rows)
    assert "".join(visible(benchmark.sample_cases([case]))).count(literal(text, line_break="\n")) >= 4
    start = {**START, "hardware": {"device": "cuda", "name": text}, "commit": text, "library": "0"}
    row = visible(numbers.provenance_table([start], records))
    assert literal(text) in row and f"commit {literal(text[:10].strip() or EMPTY)}" in row
    greedy = records[records["dataset"] == "cnle"].head(1).assign(editor=text, **{f"generated_{MEASURES[0]}": [[text]]})
    compared = spot_check.compare(greedy.assign(**{f"sha256_{MEASURES[0]}": [["0"]]}), greedy)
    assert f"{text!r} -> {text!r}" in printable(spot_check.describe(compared))


@pytest.mark.parametrize("name", ["$x^2$ and $y$", "a$b", "\x1b[31m\x00", "\\frac{$1$}{2}", "a_b^c"])
def test_names_in_figures_are_no_formulas(records, name):
    figure = rq1.proficiency_figure(records.assign(dataset=name, editor=name))
    figure.canvas.draw()
    (axis,) = figure.axes
    layout = axis.title._preprocess_math(axis.title.get_text())
    assert layout == (f"{printable(name)}, 20 cases per editor", False)
    plt.close(figure)


class _Terminal(io.TextIOWrapper):
    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)

    def text(self) -> str:
        return self.buffer.getvalue().decode(self.encoding)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_terminal_shows_any_text(encoding, tmp_path, monkeypatch):
    outputs = {name: _Terminal(encoding) for name in ("stdout", "stderr")}
    for name, stream in outputs.items():
        monkeypatch.setattr(sys, name, stream)
    agreement = pd.DataFrame([{"editor": "é\x1b[31m", "greedy": 10, "greedy_same": 10}])
    difference = spot_check.Difference("a\x1b]0;b\x07", "grace", 1, "effectiveness", None, "日")
    comparison = spot_check.Comparison(agreement, [difference], [])
    monkeypatch.setattr(spot_check, "compare", lambda *_: comparison)
    monkeypatch.setattr(run_folder, "load_run", lambda _: None)
    assert cli.main(["check", str(RUN), str(RUN)]) == 0
    assert cli.main(["data", "check", str(tmp_path / "日\x1b[31m\u202e.json")]) == 1
    shown = {name: stream.text() for name, stream in outputs.items()}
    assert ("é" if encoding != "ascii" else "\\xe9") + "\\x1b[31m" in shown["stdout"] and "passed" in shown["stdout"]
    assert "differs: a\\x1b]0;b\\x07 grace case 1 effectiveness: (text not published) -> '" in shown["stdout"]
    assert ("日" if encoding == "utf-8" else "\\u65e5") + "\\x1b[31m\\u202e.json" in shown["stderr"]
    assert "\x1b" not in "".join(shown.values())


@pytest.mark.slow
@pytest.mark.parametrize("words", ["list", "run --help"])
def test_a_reader_that_has_gone_ends_a_command_in_silence(words):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "clme_lib.cli", *words.split()]
    done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.stderr == b"" and done.returncode in (0, 141)


@pytest.mark.slow
def test_a_full_disk_behind_the_output_is_told():
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "clme_lib.cli", "measure", "list"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE
        )
    assert (
        done.returncode == 1 and done.stderr == b"clme: cannot write the output: [Errno 28] No space left on device\n"
    )
