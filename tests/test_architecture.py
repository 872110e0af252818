"""The layout of the library: what may import what, and what is said in one place."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "clme_lib"
# each imports from those before it alone; the book's page on the layout has the same order
LAYERS = ("support", "metrics", "edits", "subjects", "datasets", "forward", "evaluation", "editors", "study", "cli")
spec = importlib.util.spec_from_file_location("layers", ROOT / "book" / "layers.py")
assert spec and spec.loader
layers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(layers)
MODULES = sorted(LIBRARY.rglob("*.py"))


def imported(path: Path) -> set[str]:
    return layers.imports_of(path, LIBRARY)


def layer(name: str) -> str:
    return name.split(".")[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(LIBRARY)))
def test_imports_run_downwards(path):
    own = layer(".".join(["clme_lib", *path.relative_to(LIBRARY).with_suffix("").parts]))
    if own == "__init__":
        return
    for name in imported(path):
        if layer(name) in LAYERS:
            assert LAYERS.index(layer(name)) <= LAYERS.index(own), f"{path.name} imports {name}"


def test_no_circles():
    names = {
        ".".join(["clme_lib", *path.relative_to(LIBRARY).with_suffix("").parts]).removesuffix(".__init__"): path
        for path in MODULES
    }
    graph = {}
    for name, path in names.items():
        targets = {target if target in names else target.rpartition(".")[0] for target in imported(path)}
        graph[name] = (targets & set(names)) - {name}
    while ground := [name for name, targets in graph.items() if not targets & set(graph)]:
        for name in ground:
            del graph[name]
    assert not graph, f"these import each other: {sorted(graph)}"


def test_the_root_is_small_and_every_folder_says_what_it_is_for():
    entries = [entry for entry in LIBRARY.iterdir() if not entry.name.startswith((".", "__pycache__"))]
    assert len(entries) <= 12
    for folder in {path.parent for path in MODULES} - {LIBRARY}:
        text = (folder / "__init__.py").read_text(encoding="utf-8")
        assert re.fullmatch(r'"""[^"\n]+\."""\n', text), folder
    assert not [path for path in MODULES if len(path.read_text(encoding="utf-8").splitlines()) > 400]


def test_the_papers_datasets_are_spelt_in_one_place():
    for path in MODULES:
        strings = [
            node.value
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant)
        ]
        assert path.name == "paper.py" or not {"cnle", "csne"} & {text for text in strings if isinstance(text, str)}, (
            path
        )


def test_nobody_asks_which_editor_it_is():
    """What differs between editors is said by the editors."""
    editors = {path.stem for path in (LIBRARY / "editors").rglob("*.py")}
    for path in MODULES:
        if "editors" in path.relative_to(LIBRARY).parts or path.parent.name == "appendices":
            continue
        names = {name.split(".")[2] for name in imported(path) if name.startswith("clme_lib.editors.")}
        assert names <= {"base", "registry", "operations"} | (names - editors) or path.parent.name == "rq3", path


def test_the_page_on_the_layout_has_these_layers():
    page = (ROOT / "book" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)", page, re.M)
    assert tuple(listed[: len(LAYERS)]) == LAYERS
