"""Wrong snippets for a target, to try its check with: nothing, small changes of the target, and other targets with its names."""

import ast
import builtins
import random
import re
import sys

from clme_lib.datasets.embedded_cnle import read_rows

TARGETS = {row["case_id"]: row for row in read_rows("cnle-targets")}
_MODULES = {*sys.stdlib_module_names, "np", "pd", "plt", "sns", "requests", "numpy", "pandas", "dt"}
_CHANGES, _OTHERS = 6, 4


class _Change(ast.NodeTransformer):
    """Change the n-th of what can be changed: a constant, a call, a comparison."""

    def __init__(self, n: int) -> None:
        self._before, self.changed = n, False

    def _is_chosen(self) -> bool:
        self._before -= 1
        self.changed = self.changed or self._before == -1
        return self._before == -1

    def visit_Constant(self, node):
        if isinstance(node.value, bool | int | float | str) and self._is_chosen():
            value = node.value
            changed = not value if isinstance(value, bool) else value + "_" if isinstance(value, str) else value + 1
            return ast.copy_location(ast.Constant(changed), node)
        return node

    def visit_Call(self, node):
        if node.args and self._is_chosen():
            return node.args[0]
        if isinstance(node.func, ast.Attribute) and self._is_chosen():
            return node.func.value
        return self.generic_visit(node)

    def visit_Compare(self, node):
        return ast.copy_location(ast.UnaryOp(ast.Not(), node), node) if self._is_chosen() else self.generic_visit(node)


def _names(code: str) -> list[str]:
    """Names that code reads and does not make itself, in the order of their places."""
    loaded, stored = [], set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name):
            (loaded.append if isinstance(node.ctx, ast.Load) else stored.add)(node.id)
    return [name for name in dict.fromkeys(loaded) if name not in stored | _MODULES and not hasattr(builtins, name)]


def wrong_snippets(case_id: int) -> list[str]:
    """Nothing first; most of the others are wrong, some happen to be right as well."""
    target = TARGETS[case_id]["snippet"]
    snippets = [""]
    for n in range(_CHANGES):
        change = _Change(n)
        tree = ast.fix_missing_locations(change.visit(ast.parse(target)))
        try:
            code = ast.unparse(tree)
            ast.parse(code)
        except (SyntaxError, ValueError):  # such as an f-string's part that is no text any more
            continue
        if change.changed and ast.dump(ast.parse(code)) != ast.dump(ast.parse(target)):
            snippets.append(code)
    row = TARGETS[case_id]
    others = [other for other in TARGETS.values() if other["topic"] == row["topic"] and other is not row]
    random.Random(case_id).shuffle(others)
    for other in others[:_OTHERS]:
        code = other["snippet"]
        for theirs, own in zip(_names(code), _names(target)):
            code = re.sub(rf"\b{re.escape(theirs)}\b", own, code)
        snippets.append(code)
    return snippets
