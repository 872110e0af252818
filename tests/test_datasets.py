"""Datasets: the hand-written rows, the mined set, renaming, the published layout, samples and folds."""

import ast
import dis
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import CodeType

import pytest
from cnle_rules import problems

from clme_lib.datasets import embedded_cnle, embedded_csne, published, source_code
from clme_lib.datasets.cases import folds, sample_cases
from clme_lib.datasets.paper import CNLE, CSNE
from clme_lib.datasets.registry import load_cases, selection_cases, selection_ids
from clme_lib.datasets.renaming import eligible_names, rename, verified
from clme_lib.subjects import embedded as embedded_subject
from clme_lib.support.errors import StudyError


def test_every_hand_written_row_keeps_the_rules():
    targets, pool = embedded_cnle.read_rows("cnle-targets"), embedded_cnle.read_rows("cnle-pool")
    assert problems(targets, pool) == []
    assert len(targets) >= 600 and len(pool) >= 600
    assert len(set().union(*(embedded_cnle.calls(row["snippet"]) for row in targets))) >= 120
    lengths = [len(row["snippet"]) for row in targets]
    for low, high in ((15, 30), (30, 45), (45, 60), (60, 91)):
        assert sum(low <= length < high for length in lengths) >= 0.12 * len(targets), (
            f"too few snippets of {low} to {high}"
        )


def test_the_rules_catch_bad_rows():
    row = {"case_id": 0, "topic": "t", "intent": "sort the list `xs` in place", "rewritten_intent": "put `xs` into ascending order please",
           "snippet": "xs.sort(reverse=True)"}  # fmt: skip
    bad = {
        "does not parse": {"snippet": "xs.sort(reverse=True"},
        "does not exist: os.path.nowhere": {"snippet": "os.path.nowhere(location)"},
        "not one trimmed": {"snippet": "xs.sort()"},
        "repeats the intent": {"rewritten_intent": "sort the list `xs` in place please"},
        "paired back-quotes": {"intent": "sort the list `xs in place"},
    }
    assert problems([row], []) == []
    for message, change in bad.items():
        assert any(message in problem for problem in problems([{**row, **change}], [])), message
    twin = {"topic": "t", "intent": "sort another list `ys` in place", "snippet": "ys.sort(reverse=True)"}
    assert any("too close" in problem for problem in problems([row], [twin]))


def test_embedded_cnle_cases():
    cases = load_cases("cnle")
    pool = {row["snippet"] for row in embedded_cnle.read_rows("cnle-pool")}
    assert all(len(set(case.unrelated)) == 5 and len(case.rephrased) == 1 for case in cases)
    assert not pool & {case.target for case in cases}
    assert all(case.prompt not in case.unrelated for case in cases)


@pytest.mark.subject
def test_embedded_csne_cases():
    cases = load_cases("csne")
    assert len(cases) >= 400
    assert all(len(set(case.unrelated)) == 5 for case in cases)
    for case in cases:
        assert case.target not in case.prompt, "the description must have been cut out of the code"
        ast.parse(case.text)
        assert case.rephrased[0] != case.prompt


@pytest.mark.subject
def test_mined_set_obeys_its_bounds():
    load_cases("csne")
    committed = json.loads(embedded_csne.COMMITTED.read_text())
    file = embedded_subject.cache_dir() / "datasets" / f"csne-{committed['sha256'][:16]}.json"
    content = json.loads(file.read_text())
    assert embedded_csne.content_sha256(content) == committed["sha256"]
    assert len(content["pool"]) >= 2000
    for part in ("targets", "pool"):
        packages = [row["package"] for row in content[part]]
        assert max(packages.count(name) for name in set(packages)) <= 0.15 * len(packages)
    for row in content["targets"]:
        packages = [content["pool"][n]["package"] for n in row["neighbours"]]
        assert sum(package != row["package"] for package in packages) >= 2
        assert bytecode(row["code"]) == bytecode(row["variant"]), row["origin"]
    assert not {row["origin"] for row in content["targets"]} & {row["origin"] for row in content["pool"]}


def bytecode(code: str):
    """Instructions of all nested code objects, names replaced by the order in which they first occur."""

    def instructions(obj: CodeType, seen: dict):
        steps = []
        for step in dis.get_instructions(obj):
            if isinstance(step.argval, CodeType):
                steps.append((step.opname, instructions(step.argval, seen)))
            elif isinstance(step.argval, (str, tuple)) and step.opcode in dis.haslocal:
                steps.append((step.opname, seen.setdefault(str(step.argval), len(seen))))
            elif step.opcode in dis.hasfree or step.opname in ("LOAD_CONST", "KW_NAMES"):
                steps.append((step.opname,))  # the order of cells follows the alphabet; constants hold argument names
            else:
                steps.append((step.opname, repr(step.argval)))
        return sorted(map(repr, steps)) if obj.co_freevars or obj.co_cellvars else steps

    return instructions(compile("from __future__ import annotations\n" + code, "f", "exec"), {})


def definition(code):
    return ast.parse(code).body[0]


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("def f(a, b=1):\n    c = a + b\n    return c", ["a", "b", "c"]),
        ("def f(self, a):\n    import os\n    return os.path.join(a)", ["a"]),
        ("def f(a):\n    global b\n    b = a", ["a"]),
        ("def f(a):\n    return f'{a}'", []),
        ("def f(a):\n    return locals()", []),
        ("def f(a, b):\n    return f(a=b, b=1)", []),
        ("def f(a):\n    def g(b):\n        return a + b\n    return g(b=1)", ["a"]),
        (
            "def f(a, x=None):\n    try:\n        pass\n    except ValueError as e:\n        x = e\n    return x, a",
            ["a", "x"],
        ),
        ("def f(a, b=c):\n    c = a\n    return b, c", ["a", "b"]),
        ("def f(a):\n    class K:\n        v = a\n    return K", ["a"]),
        ("def f(xs):\n    return [x for x in xs if x]", ["xs"]),
        ("def f(_a, list):\n    return _a, list", []),
    ],
)
def test_eligible_names(code, names):
    assert eligible_names(definition(code)) == names


def test_renaming_keeps_the_function_and_its_layout():
    code = "def f(data, n = 2):\n    rows = [data.n for data in data]   # fmt\n    g = lambda data: data*n\n    return g(rows)"
    mapping = {"data": "xs", "rows": "out", "g": "h"}
    variant = rename(code, mapping)
    assert variant.split("\n")[1] == "    out = [xs.n for xs in xs]   # fmt"
    assert verified(code, variant, mapping)
    assert bytecode(code) == bytecode(variant)
    assert not verified(code, variant.replace("*n", "+n"), mapping)
    assert not verified(code, rename(code, {"data": "n"}), {"data": "n"}), "a capture must be found"
    assert not verified(code, rename(code, {"data": "x", "rows": "x"}), {"data": "x", "rows": "x"})


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the mean of values.\n\nLonger text.", "Return the mean of values."),
        (
            "Return the :class:`~a.b.C`\n    of the given values. More.",
            "Return the a.b.C of the given values.",
        ),
        ("return lower case is not it.", None),
        ("See the other function for it.", None),
        ("This is a function of words.", None),
        ("Too short.", None),
        ("No full stop at the end", None),
        ("Fetch it from https://example.org now.", None),
    ],
)
def test_description(docstring, sentence):
    assert source_code.description(docstring) == sentence


def record(**request):
    fields = {"intent": "a b", "snippet": "x = 1", "rewritten_intent": "b a", **request}
    return {
        "case_id": 3,
        "edit_request": fields,
        "neighborhoods": {
            "items": [{"intent": f"n{k}"} for k in range(5)],
            "answers": {"CodeLlama-7b-hf": ["a"] * 5},
        },
    }


def test_published_layout_round_trip(tmp_path, cases):
    path = tmp_path / "EditConala.json"
    path.write_text(json.dumps([record()]))
    (case,) = load_cases("cnle", str(path))
    assert (case.case_id, case.prompt, case.target) == (3, "Intent: a b\nCode:", "x = 1")
    assert case.rephrased == ("Intent: b a\nCode:",) and case.unrelated[4] == "Intent: n4\nCode:"
    published.write(path, [case])
    assert published.read(path, CNLE) == [case]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: r.pop("case_id"), "record 0: field 'case_id' is missing"),
        (lambda r: r.update(case_id="3"), "field 'case_id' is str, expected int"),
        (lambda r: r["edit_request"].update(snippet=None), "edit_request: field 'snippet' is NoneType"),
        (lambda r: r["edit_request"].update(snippet=" "), "snippet is empty"),
        (lambda r: r["neighborhoods"]["items"].pop(), "items has 4 entries, expected 5"),
        (
            lambda r: r["neighborhoods"]["items"].__setitem__(2, {"code": ""}),
            "items.2.: field 'intent' is missing; found 'code'",
        ),
        (lambda r: r["neighborhoods"]["answers"].update(m=["a"]), "answers must map each model to 5"),
        (lambda r: r["neighborhoods"]["answers"].update(m=None), "answers must map each model to 5"),
    ],
)
def test_malformed_records_are_named(tmp_path, damage, message):
    path = tmp_path / "EditConala.json"
    bad = record()
    damage(bad)
    path.write_text(json.dumps([bad]))
    with pytest.raises(StudyError, match=message) as error:
        published.read(path, CNLE)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[]", b"{}", b"[3]"])
def test_malformed_files_are_named(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(StudyError, match=r"x\.json"):
        published.read(path, CNLE)


def test_duplicate_ids_are_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps([record(), record()]))
    with pytest.raises(StudyError, match="case_id 3 occurs twice"):
        published.read(path, CNLE)


@pytest.fixture
def zenodo(tmp_path, monkeypatch):
    """A local stand-in for the record's API; ``serve(content, checksum)`` starts it."""
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))
    servers = []

    def serve(content: bytes, checksum: str) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                base = f"http://127.0.0.1:{self.server.server_port}"
                body = content
                if "/records/" in self.path:
                    files = [
                        {
                            "key": "EditConala.json",
                            "checksum": f"md5:{checksum}",
                            "links": {"self": f"{base}/file"},
                        }
                    ]
                    body = json.dumps({"files": files}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/api"

    yield serve
    for server in servers:
        server.shutdown()


def test_download_checks_the_checksum(zenodo, tmp_path):
    content = json.dumps([record()]).encode()
    good = zenodo(content, hashlib.md5(content).hexdigest())
    bad = zenodo(content, "0" * 32)
    with pytest.raises(StudyError, match="MD5 differs"):
        published.fetch(CNLE, api=bad)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()], "nothing half-written"
    assert published.read(published.fetch(CNLE, api=good), CNLE)[0].case_id == 3
    with pytest.raises(StudyError, match="EditCodeSearchNet"):
        published.fetch(CSNE, api="http://127.0.0.1:9/unused")


def test_no_network_is_said_with_the_remedy(zenodo):
    with pytest.raises(StudyError, match="download it yourself from https://doi.org/10.5281/zenodo.12818365"):
        published.fetch(CNLE, api="http://127.0.0.1:9/api")


def test_unknown_data(tmp_path):
    with pytest.raises(StudyError, match="known: cnle, csne"):
        load_cases("conala")
    with pytest.raises(StudyError, match="neither"):
        load_cases("cnle", str(tmp_path / "missing.json"))


def test_samples_are_nested_and_folds_disjoint():
    cases = load_cases("cnle")
    small, large = sample_cases(cases, 10, 1), sample_cases(cases, 30, 1)
    assert large[:10] == small
    assert {c.case_id for c in sample_cases(cases, 10, 2)} != {c.case_id for c in small}
    first, second = folds(cases, 42)
    assert (
        not set(first) & set(second) and len(first) + len(second) == len(cases) and abs(len(first) - len(second)) <= 1
    )
    assert folds(cases[::-1], 42) == (first, second)


def test_selection_cases_exist():
    ids = {case.case_id for case in load_cases("cnle")}
    assert len(selection_ids("cnle")) == 30 and selection_ids("cnle") <= ids
    assert len(selection_ids("csne")) == 30
    for count in (0, 31):
        with pytest.raises(StudyError, match=f"cases={count}: cnle has 30 selection cases; choose from 1 to 30"):
            selection_cases("cnle", count)


def test_mining_refuses_other_versions(monkeypatch, tmp_path):
    monkeypatch.setenv("CLME_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded_csne, "installed_versions", lambda: {"numpy": "1.0"})
    with pytest.raises(StudyError, match=r"numpy 1\.0 \(pinned"):
        embedded_csne.load(CSNE)
