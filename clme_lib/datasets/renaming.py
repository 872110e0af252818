"""Meaning-preserving renaming of a function's variables: CSNE's generalization input (in the spirit of ALERT).

Which names may change is decided conservatively on the syntax tree; what they become is chosen by distributional
similarity in a corpus of functions, with integer arithmetic only, so that every machine makes the same choice; the
names are replaced by source position, so the layout stays; and every variant is verified.
"""

from __future__ import annotations

import ast
import builtins
import dis
import keyword
import symtable
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from .source_code import Function, parsed, source_lines

MIN_OCCURRENCES = 12
# calls that can reach any variable of a function by its name, and calls that can reach the parameters of a nested function
_INTROSPECTION = {"locals", "eval", "exec", "vars", "globals", "dir", "builtins", "__builtins__"}
_FRAMES = {"f_locals", "currentframe", "_getframe"}
_SIGNATURES = {
    "signature",
    "getfullargspec",
    "getcallargs",
    "get_type_hints",
    "__code__",
    "__kwdefaults__",
    "__annotations__",
}
_EXPRESSIONS = {"eval", "query", "evaluate"}  # methods that evaluate a text with variables in it
_FORBIDDEN = set(keyword.kwlist) | set(keyword.softkwlist) | set(dir(builtins)) | {"self", "cls", "mcs"}
# instructions whose argument is a variable's name (a global's or an attribute's is never renamed)
_OF_VARIABLES = {*dis.haslocal, *dis.hasfree}
_FACTS = ("is_local", "is_global", "is_free", "is_parameter", "is_assigned", "is_referenced")
# (name, taken names) -> its new name, or None
Substitute = Callable[[str, set[str]], str | None]


def eligible_names(function: Function) -> list[str]:
    """Names that can be renamed throughout ``function`` without changing what it does, in order of appearance.

    A name qualifies when the function's own scope binds it (parameter or assignment): every occurrence in nested
    scopes then refers to it or rebinds it, and one uniform renaming is alpha-conversion. Everything that is reached by its
    spelling from elsewhere is excluded: what is bound without a position of its own (:func:`_spelt`: imports, ``global``,
    ``except ... as``), class bodies, keyword calls of local functions and of the function itself, names inside f-strings (their
    positions are wrong before Python 3.12) and names that default values or annotations share. A function that looks names
    up at run time has none.
    """
    nodes = list(ast.walk(function))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {part for node in nodes if isinstance(node, ast.alias) for part in node.name.split(".")}
    strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    # f_back reaches a caller, which may be this function if it has nested ones
    nested = any(isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) for node in nodes[1:])
    own_frame = _FRAMES & (names | attributes | strings) and (nested or "f_back" not in attributes)
    if _INTROSPECTION & (names | strings) or own_frame or any(map(_reads_expression, calls)):
        return []
    if any(isinstance(node, ast.Match) for node in nodes):
        return []
    bound = dict.fromkeys([*_parameters(function.args), *_bound_in_scope(function.body)])
    excluded = _FORBIDDEN.union(*map(_spelt, nodes[1:]))
    nested_parameters: set[str] = set()
    for node in nodes[1:]:
        if isinstance(node, ast.ClassDef):
            excluded |= {*_bound_in_scope(node.body)}
        elif isinstance(node, ast.JoinedStr):
            excluded |= {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            nested_parameters |= set(_parameters(node.args))
    keywords = {word.arg for call in calls for word in call.keywords if word.arg}
    any_keyword = any(word.arg is None for call in calls for word in call.keywords)  # ``**`` is known only at run time
    by_name = any_keyword or _SIGNATURES & (names | attributes | strings)
    excluded |= nested_parameters if by_name else nested_parameters & (keywords | strings)
    to_itself = [word for call in calls if _called(call) == function.name for word in call.keywords]
    excluded |= {word.arg for word in to_itself if word.arg}
    if function.name not in bound:
        itself = {f"{receiver}{function.name}" for receiver in ("", "self.", "cls.", "super().")}
        # keywords that its own ``**`` collects are not parameters
        passed = {
            ast.unparse(word.value)
            for call in calls
            if ast.unparse(call.func) in itself
            for word in call.keywords
            if not word.arg
        }
        if passed - {getattr(function.args.kwarg, "arg", None)}:
            excluded |= {*_parameters(function.args)}
        # passed to something that may call it, such as ``partial``
        handed_on = set(nodes) - {call.func for call in calls}
        if any(isinstance(node, ast.Name) and node.id == function.name for node in handed_on):
            excluded |= {*_parameters(function.args)} if by_name else keywords | strings
    # defaults, and annotations inside the arguments
    outside = [function.args, *filter(None, [function.returns])]
    excluded |= {node.id for part in outside for node in ast.walk(part) if isinstance(node, ast.Name)}
    return [name for name in bound if name not in excluded and not name.startswith("_")]


def _spelt(node: ast.AST) -> set[str]:
    """Names that a node binds or declares as plain strings: imports, ``global``, captures, functions, type parameters, ..."""
    if isinstance(node, ast.alias):
        return {(node.asname or node.name).split(".")[0]}
    names = [getattr(node, "name", None), getattr(node, "rest", None), *getattr(node, "names", ())]
    return {name for name in names if isinstance(name, str)}


def _reads_expression(call: ast.Call) -> bool:
    return _called(call) in _EXPRESSIONS and any(isinstance(text, ast.JoinedStr) or (isinstance(text, ast.Constant)
                                                 and isinstance(text.value, str)) for text in call.args)  # fmt: skip


def choose_names(function: Function, substitute: Substitute) -> dict[str, str]:
    """A new name, unused in the function and no keyword or builtin, for each eligible name that ``substitute`` has one for."""
    nodes = list(ast.walk(function))
    taken = {node.id for node in nodes if isinstance(node, ast.Name)} | set(keyword.kwlist) | set(dir(builtins))
    taken |= {node.arg for node in nodes if isinstance(node, ast.arg | ast.keyword) and node.arg}
    taken |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    taken = taken.union(*map(_spelt, nodes[1:]))
    mapping = {}
    for name in eligible_names(function):
        if new := substitute(name, taken):
            mapping[name] = new
            taken.add(new)
    return mapping


def rename(code: str, mapping: dict[str, str]) -> str:
    """Replace names by source position; ``code`` is one ASCII function definition."""
    occurrences = []
    for node in ast.walk(ast.parse(code)):
        name = node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else None
        if name in mapping:
            occurrences.append((node.lineno, node.col_offset, name))  # type: ignore[attr-defined]
    lines = source_lines(code)
    for line, column, name in sorted(occurrences, reverse=True):
        text = lines[line - 1]
        lines[line - 1] = text[:column] + mapping[name] + text[column + len(name) :]
    return "\n".join(lines)


def verified(code: str, variant: str, mapping: dict[str, str]) -> bool:
    """Whether ``variant`` is ``code`` up to ``mapping``: trees equal in both directions, symbol tables isomorphic."""
    inverse = {new: old for old, new in mapping.items()}
    if not mapping or len(inverse) != len(mapping):
        return False
    try:
        forth = _mapped(ast.parse(code), lambda name: mapping.get(name, name)) == ast.dump(ast.parse(variant))
        back = _mapped(ast.parse(variant), lambda name: inverse.get(name, name)) == ast.dump(ast.parse(code))
        before, after = (symtable.symtable(text, "function", "exec") for text in (code, variant))
    except (SyntaxError, ValueError, RecursionError):
        return False
    return forth and back and _facts(before, mapping) == _facts(after, {})


def same_up_to_names(code: str, variant: str) -> bool:
    """Whether two pieces of code differ only by a one-to-one renaming of variables, parameters and functions."""

    def numbered(text: str) -> str | None:
        numbers: dict[str, str] = defaultdict(lambda: f"v{len(numbers)}")  # numbered by first appearance
        tree = parsed(text)
        return _mapped(tree, numbers.__getitem__, functions=True) if tree else None

    try:
        before, after = numbered(code), numbered(variant)
    except RecursionError:
        return False
    return before is not None and before == after


def same_bytecode(code: str, variant: str, mapping: dict[str, str]) -> bool:
    """Whether both compile to the same instructions up to ``mapping``, including all nested code objects.

    Annotations are ignored, because a function stores them under its parameters' names. The order in which a closure's cells are
    passed is ignored too, because it is alphabetical.
    """
    try:
        before, after = (compile(_unannotated(text), "function", "exec", dont_inherit=True) for text in (code, variant))
    except (SyntaxError, ValueError, RecursionError):
        return False
    return _instructions(before, mapping) == _instructions(after, {})


def _unannotated(code: str) -> ast.Module:
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
    return tree


def _instructions(code: types.CodeType, names: dict[str, str]) -> list[tuple]:
    steps: list[tuple] = []
    cells: list[tuple] = []  # a sequence of instructions that make or pass cells
    shared = {names.get(name, name) for name in (*code.co_cellvars, *code.co_freevars)}
    for step in dis.get_instructions(code):
        value, of_variable = step.argval, step.opcode in _OF_VARIABLES
        if isinstance(value, types.CodeType):
            counts = value.co_argcount, value.co_kwonlyargcount, value.co_flags
            value = (value.co_name, *counts, _instructions(value, names))
        elif of_variable:  # newer interpreters load two variables with one instruction
            value = tuple(names.get(n, n) for n in value) if isinstance(value, tuple) else names.get(value, value)
        elif isinstance(value, frozenset):
            value = sorted(map(repr, value))
        if of_variable and value in shared:
            cells.append((step.opname, repr(value)))
        else:
            steps += [*sorted(cells), (step.opname, repr(value))]
            cells = []
    return steps + sorted(cells)


class Substitutes:
    """Names ranked by how similarly a corpus uses them.

    Each name is the set of syntactic contexts it occurs in (argument of which call, attribute taken, iterated,
    compared, ...). A rarer context weighs more; similarity is the weighted share of common contexts. All
    arithmetic is on integers, and ties are broken alphabetically.
    """

    def __init__(self, functions: Iterable[Function]) -> None:
        contexts: dict[str, set] = defaultdict(set)
        counts: Counter[str] = Counter()
        for function in functions:
            names = set(eligible_names(function))
            for name, context in _contexts(function):
                if name in names:
                    contexts[name].add(context)
            counts.update(names)
        self._contexts = {name: own for name, own in contexts.items() if counts[name] >= MIN_OCCURRENCES}
        frequency = Counter(context for own in self._contexts.values() for context in own)
        size = len(self._contexts)
        self._weight = {context: (size // names).bit_length() for context, names in frequency.items()}
        self._mass = {name: sum(self._weight[context] for context in own) for name, own in self._contexts.items()}
        self._ranked: dict[str, list[str]] = {}

    def substitute(self, name: str, taken: set[str]) -> str | None:
        """The most similar name that is not taken; None for a name that is rare in the corpus (a :data:`Substitute`)."""
        if name in self._contexts and name not in self._ranked:
            own = self._contexts[name]

            def unlikeness(candidate: str) -> tuple[int, str]:
                shared = sum(self._weight[context] for context in own & self._contexts[candidate])
                return -(2_000_000 * shared // (self._mass[name] + self._mass[candidate] or 1)), candidate

            # a one-letter name gets a one-letter name
            candidates = [n for n in self._contexts if n != name and (len(n) == 1) == (len(name) == 1)]
            self._ranked[name] = sorted(candidates, key=unlikeness)[:40]
        return next((candidate for candidate in self._ranked.get(name, ()) if candidate not in taken), None)


def _parameters(args: ast.arguments) -> list[str]:
    return [argument.arg for argument in ast.iter_child_nodes(args) if isinstance(argument, ast.arg)]


def _bound_in_scope(body: list[ast.stmt]) -> list[str]:
    """Names assigned by the statements of one scope, not of scopes nested in it, in order of appearance."""
    names = []
    waiting: list[ast.AST] = list(body)
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
        nested = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda,
                  ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)  # fmt: skip
        if not isinstance(node, nested):
            waiting[:0] = list(ast.iter_child_nodes(node))
    return names


def _contexts(function: Function) -> Iterable[tuple[str, tuple]]:
    """(name, context) for every use of a variable that says something about its role."""
    for position, name in enumerate(_parameters(function.args)):
        yield name, ("parameter", min(position, 4))
    for node in ast.walk(function):
        for part, context in _uses(node):
            if isinstance(part, ast.Name):
                yield part.id, context


def _uses(node: ast.AST) -> Iterable[tuple[ast.expr | None, tuple]]:
    """Parts of a node, each with the context it stands in."""
    match node:
        case ast.Call():
            for position, argument in enumerate(node.args):
                yield argument, ("argument", _called(node), position)
            yield from ((word.value, ("keyword", word.arg)) for word in node.keywords if word.arg)
            yield node.func, ("called",)
        case ast.Attribute():
            yield node.value, ("attribute", node.attr)
        case ast.Subscript():
            yield from ((node.value, ("subscripted",)), (node.slice, ("index",)))
        case ast.For() | ast.comprehension():
            yield from ((node.iter, ("iterated",)), (node.target, ("loop variable",)))
        case ast.Assign(value=ast.Call() as call):
            yield from ((target, ("assigned from", _called(call))) for target in node.targets)
        case ast.Compare():
            for operator, right in zip(node.ops, node.comparators):
                constant = type(right.value).__name__ if isinstance(right, ast.Constant) else "expression"
                yield node.left, ("compared", type(operator).__name__, constant)
        case ast.BinOp():
            yield from ((side, ("operand", type(node.op).__name__)) for side in (node.left, node.right))
        case ast.Return():
            yield node.value, ("returned",)


def _called(call: ast.Call) -> str:
    """Name of the function or method that is called."""
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "?")


def _mapped(tree: ast.AST, new_name: Callable[[str], str], functions: bool = False) -> str:
    """The tree with renamed variables, and with renamed functions if ``functions`` is true."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            node.id = new_name(node.id)
        elif isinstance(node, ast.arg):
            node.arg = new_name(node.arg)
        elif functions and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.name = new_name(node.name)
    return ast.dump(tree)


def _facts(table: symtable.SymbolTable, names: dict[str, str]) -> tuple[list, list]:
    """What a symbol table says about each name (two names mapped to one remain two entries), and the same for its nested tables."""
    of_names = [
        (names.get(symbol.get_name(), symbol.get_name()), [getattr(symbol, fact)() for fact in _FACTS])
        for symbol in table.get_symbols()
    ]
    return sorted(of_names), [_facts(nested, names) for nested in table.get_children()]
