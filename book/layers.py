"""Draw the library's folders and the imports between them, from the code (for the page on the layout)."""

import ast
import html
from collections import Counter
from pathlib import Path

WIDTH, HEIGHT, GAP, BOX = 1000, 62, 14, 620


def imports_of(path: Path, library: Path) -> set[str]:
    """Modules and names of the library that a module imports, also inside functions; imports only for type checking do not count."""
    package = [library.name, *path.relative_to(library).with_suffix("").parts][:-1]
    names: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names |= {".".join([*base, alias.name]) for alias in node.names}
        waiting += ast.iter_child_nodes(node)
    return {name for name in names if name.startswith(f"{library.name}.")}


def imports_between(library: Path) -> tuple[list[str], Counter[tuple[str, str]]]:
    """The folders and the command module, from the lowest layer up, and how many modules of each import from each of the others."""
    folders = ["cli", *(entry.name for entry in library.iterdir() if (entry / "__init__.py").is_file())]
    pairs: Counter[tuple[str, str]] = Counter()
    for path in library.rglob("*.py"):
        own = path.relative_to(library).with_suffix("").parts[0]
        targets = {name.split(".")[1] for name in imports_of(path, library)} & set(folders)
        pairs.update((own, target) for target in targets - {own} if own in folders)
    order: list[str] = []
    while left := [folder for folder in folders if folder not in order]:
        grounded = [folder for folder in left if not any(pairs[folder, other] for other in left)]
        order += sorted(grounded or left)
    return order, pairs


def draw(library: Path) -> str:
    """The figure as SVG."""
    order, pairs = imports_between(library)
    top = {folder: (len(order) - 1 - place) * (HEIGHT + GAP) + 10 for place, folder in enumerate(order)}
    parts = []
    for folder, y in top.items():
        home = library / folder / "__init__.py"
        files = sorted(home.parent.rglob("*.py")) if home.is_file() else [library / f"{folder}.py"]
        purpose = (
            ast.get_docstring(ast.parse((home if home.is_file() else files[0]).read_text(encoding="utf-8"))) or ""
        ).splitlines()[0]
        modules = len([file for file in files if file.name != "__init__.py"])
        parts.append(
            f'<rect x="10" y="{y}" width="{BOX}" height="{HEIGHT}" rx="6" fill="#eef3f8" stroke="#4477aa"/>'
            f'<text x="24" y="{y + 25}" font-size="17" font-weight="bold">{folder}</text>'
            f'<text x="{BOX - 4}" y="{y + 25}" font-size="13" text-anchor="end" fill="#555">{modules} module{"s" * (modules > 1)}</text>'
            f'<text x="24" y="{y + 48}" font-size="12.5" fill="#333">{html.escape(purpose.replace("``", ""))}</text>'
        )
    for (upper, lower), count in sorted(pairs.items()):
        start, end = top[upper] + HEIGHT / 2, top[lower] + HEIGHT / 2
        bend = BOX + 20 + 0.42 * abs(end - start)
        parts.append(
            f'<path d="M{BOX + 10},{start} C{bend},{start} {bend},{end} {BOX + 12},{end}" fill="none" stroke="#aa3377" '
            f'stroke-opacity="0.55" stroke-width="{0.8 + 0.16 * count:.1f}" marker-end="url(#head)"><title>{upper} → {lower}: {count}</title></path>'
        )
    marker = (
        '<marker id="head" viewBox="0 0 6 6" refX="6" refY="3" markerWidth="9" markerHeight="9" markerUnits="userSpaceOnUse" '
        'orient="auto"><path d="M0,0 L6,3 L0,6 z" fill="#aa3377"/></marker>'
    )
    height = len(order) * (HEIGHT + GAP) + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif"><defs>{marker}</defs>'
        f"{''.join(parts)}</svg>\n"
    )
