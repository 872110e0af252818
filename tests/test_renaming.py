"""Renaming changes names and nothing else: whatever is chosen, a function does what it did; positions are Python's own."""

import ast
import itertools
import random
import re
import symtable
from collections import Counter

import pytest

from clme_lib.datasets import source_code
from clme_lib.datasets.construction.sources import bare_function
from clme_lib.datasets.renaming import choose_names, eligible_names, rename, same_bytecode, verified

# (code, arguments): every way to bind a name without reading it, and to look one up
FUNCTIONS = [
    ("""def f(paths):
    result = []
    for path in paths:
        try:
            int(path)
        except ValueError as err:
            continue
        value = int(path)
        result.append(value)
    return value, result""", (["1", "x", "2"],)),
    ("""def f(data):
    import os.path as place
    from json import dumps as shown
    total = sum(data)
    return total, data""", ([1, 2],)),
    ("""def f(data):
    from contextlib import nullcontext
    with nullcontext(data) as opened:
        first = data[0]
    second = opened
    return first, second""", ([3, 4],)),
    ("""def f(data):
    for unread in data:
        pass
    kept = [data for data in data]
    last = [kept for kept in kept]
    return kept, last""", ([5, 6],)),
    ("""def f(data):
    extra = data
    del extra
    other = data
    return other""", ([7],)),
    ("""def f(start):
    global memory
    memory = start
    step = start + 1
    return step, memory""", (1,)),
    ("""def f(start):
    def inner():
        nonlocal count
        count += start
    count = 0
    total = start
    inner()
    return count, total""", (3,)),
    ("""def f(start, more):
    def inner(key, step=1):
        return key + step
    options = {'key': start}
    return inner(**options), inner(start, step=more), dict(more=more)""", (1, 2)),
    ("""def f(start, more):
    from functools import partial
    def inner(key, step):
        return key - step
    return partial(inner, step=more)(start)""", (1, 2)),
    ("""def f(start, more=None):
    from functools import partial
    again = partial(f, more=start)
    return again(1) if more is None else (start, more)""", (5,)),
    ("""def f(start, more=None):
    if more is None:
        return f(**{'start': start, 'more': 2})
    return start - more""", (5,)),
    ("""def f(self, start, more=0, **others):
    found = more or others.get('depth')
    return f(self, start, more=1, **others) if not found else (start, found)""", (None, 5)),
    ("""def f(start, more):
    total = eval('start + more')
    return total""", (1, 2)),
    ("""def f(start):
    import builtins as hidden
    total = hidden.eval('start + 1')
    return total""", (1,)),
    ("""def f(start):
    total = __import__('builtins').eval('start' + '+ 1')
    return total""", (1,)),
    ("""def f(start):
    total = '{start}'.format(**locals())
    return total""", (1,)),
    ("""def f(start):
    import sys
    total = sys._getframe().f_locals['start']
    return total""", (1,)),
    ("""def f(start):
    import sys
    def inner():
        return sys._getframe().f_back.f_locals['start']
    return inner()""", (1,)),
    ("""def f(start):
    import inspect
    def inner(key, step):
        return key
    return list(inspect.signature(inner).parameters), start""", (1,)),
    ("""def f(start):
    total = 1
    class Inner:
        total = 2
        def method(self, key=start):
            return key, total
    return Inner.total, Inner().method()""", (4,)),
    ("""def f(start):
    total = [last := item for item in start]
    other = f"{total} {last}"
    return other, total""", ([1, 2],)),
    ("""def f(start):
    match start:
        case [first, *others]:
            kept = others
        case {'key': value, **rest}:
            kept = value
        case other:
            kept = other
    return kept""", ([1, 2],)),
    ("""def f(start):
    total = lambda start, step=1: start + step
    return total(start, step=3)""", (1,)),
    ("""def f(start):
    other = 2
    return f.__name__, start, (lambda other: other)(other)""", (1,)),
]  # fmt: skip
IDS = [str(number) for number in range(len(FUNCTIONS))]


def outcome(code, arguments):
    """What the function gives, or raises."""
    space: dict = {}
    exec(code, space)
    try:
        return repr(space["f"](*arguments)), space.get("memory")
    except Exception as error:
        return type(error)


def symbols(code, mapping):
    """How often each name stands in which role, over all scopes."""
    waiting, counted = [symtable.symtable(code, "f", "exec")], Counter()
    while waiting:
        table = waiting.pop()
        waiting += table.get_children()
        counted.update(
            (table.get_name(), mapping.get(symbol.get_name(), symbol.get_name()), symbol.is_local(), symbol.is_parameter())
            for symbol in table.get_symbols()
        )  # fmt: skip
    return counted


@pytest.mark.parametrize(("code", "arguments"), FUNCTIONS, ids=IDS)
def test_a_renamed_function_does_what_it_did(code, arguments):
    function = source_code.single_function(code)
    draw = random.Random(0)
    pool = sorted({*re.findall(r"[a-z]\w*", code), "fresh", "other_one", "third"})
    expected = outcome(code, arguments)
    assert expected is not NameError
    for _ in range(30):
        mapping = choose_names(
            function, lambda name, taken: draw.choice([*(word for word in pool if word not in taken), None])
        )
        variant = rename(code, mapping)
        assert not mapping or verified(code, variant, mapping), variant
        assert not mapping or same_bytecode(code, variant, mapping), variant
        assert outcome(variant, arguments) == expected, variant
        assert symbols(code, mapping) == symbols(variant, {})


@pytest.mark.parametrize(("code", "arguments"), FUNCTIONS, ids=IDS)
def test_a_collision_is_never_verified(code, arguments):
    words = sorted({node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)})
    words += [
        alias.asname for node in ast.walk(ast.parse(code)) for alias in getattr(node, "names", []) if hasattr(alias, "asname") and alias.asname
    ] + [node.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ExceptHandler)]  # fmt: skip
    for name, new in itertools.permutations(words, 2):
        if name in eligible_names(source_code.single_function(code)):
            assert not verified(code, rename(code, {name: new}), {name: new}), (name, new)


def test_names_that_are_looked_up_are_not_changed():
    def names(code):
        return eligible_names(source_code.single_function(code))

    assert names("def f(frame, top):\n    return frame.query('x > @top')") == []
    assert names("def f(model, top):\n    return model.eval(), top") == ["model", "top"]
    assert names("def f(a):\n    try:\n        pass\n    except E as a:\n        pass\n    return a") == []
    assert names("def f(a, call):\n    def g(key):\n        return key\n    return call(g, {'key': a})") == [
        "a",
        "call",
    ]


LINES = ["\n", "\r\n", "\r"]
ODD = ["\x0c", "\x1c", "\x85", "\u2028", "\u2029"]


@pytest.mark.parametrize("end", LINES, ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("odd", ["", *ODD], ids=lambda text: text.encode("unicode_escape").decode() or "none")
def test_a_function_is_bared_by_pythons_own_lines(end, odd):
    code = end.join([
        "def f(a,", "      b):", f'    """Close{odd} all.{end}   More.{odd}', '    """', f"    c = 'x{odd}y'  # why{odd} not",
        f"    # alone{odd}", "    if c:", f'        return c, """t{odd}', '  u""", a', "    return b",
    ])  # fmt: skip
    function = ast.parse(code).body[0]
    function.body = function.body[1:]
    for text in (code, code.replace(f"{end}    ", f"{end}        ").replace(f"{end}      b", f"{end}          b")):
        bare = bare_function(text)
        if text == code or bare is not None:
            assert ast.dump(ast.parse(bare).body[0]) == ast.dump(function)
            assert "#" not in bare and "More" not in bare
    variant = rename(bare_function(code).replace(odd or "@", ""), {"c": "value", "b": "second"})
    assert verified(bare_function(code).replace(odd or "@", ""), variant, {"c": "value", "b": "second"})


def test_a_lone_carriage_return_hides_no_statement():
    code = 'def f(a):\n    """Close all.\r More.\n"""\n    a.close()\n    return a'
    assert bare_function(code) == "def f(a):\n    a.close()\n    return a"
    assert rename("def f(a):\r    b = a\r    return b", {"a": "x", "b": "y"}) == "def f(x):\n    y = x\n    return y"


@pytest.mark.parametrize(
    "code",
    [
        "def f(a):\n    b = '''\n\tx   \n'''\n    return b",  # a tab and trailing spaces in a string
        "def f(self):\n            b = '''\n        x\n'''\n            return b",  # a method of CodeSearchNet, with a string
        "def f(a):\n    '''Doc.'''\n    b = '''\n    # no comment\n'''\n    return b  # a comment",
        "def f(a):\n    return '''\n   \n'''",
    ],
)
def test_the_text_of_strings_stays(code):
    before, after = source_code.single_function(code), source_code.single_function(bare_function(code) or code)
    before.body = before.body[1:] if ast.get_docstring(before) else before.body
    assert ast.dump(before) == ast.dump(after)


def test_what_cannot_be_bared_is_none():
    deep = "def f(a):\n    return " + "+".join(["a"] * 600)
    for code in (
        deep,
        "def f(a):\n    return (" * 90,
        "def f(a):\n    return a\0",
        "def f(a: '''x\n'''): '''Doc.'''",
        "",
    ):
        assert bare_function(code) is None
    assert not verified("def f(a): return a", deep, {"a": "b"})


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return x, e.g. y. More.", "Return x, e.g. y."),
        ("Return all of x, i.e. Y. More.", "Return all of x, i.e. Y."),
        ("Compare the left vs. the right. More.", "Compare the left vs. the right."),
        ("Close files, pipes, etc. Then return.", "Close files, pipes, etc."),
        ("Close files, pipes, etc. on exit. More.", "Close files, pipes, etc. on exit."),
        ("Return the first of them\n   \n:param x: the values. All.", "Return the first of them"),
        ("Return the first of them\n\t\n:param x: the values. All.", "Return the first of them"),
        ("Return the first of them\n    \n    :param x: the values.", "Return the first of them"),
        ("Close all of them.\r\n\r\nMore of it.", "Close all of them."),
        ("Close all of them\r \rMore of it.", "Close all of them"),
    ],
)
def test_first_sentences(docstring, sentence):
    assert source_code.first_sentence(docstring) == sentence


def test_a_description_has_no_abbreviation():
    assert source_code.description("Return the values of x, e.g. y.") is None
    assert source_code.description("Return the values of the x.\n   \n:param x: that.") == "Return the values of the x."
