"""Code that a stranger reads once: short files and functions, one thought a line, telling names."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "qlab").rglob("*.py"))
MOST_TOKENS_A_LINE = 9.0  # over the package; houses we admire have 4.7 to 8.4
MOST_LINES_A_FILE = 400
MOST_LINES_A_FUNCTION = 60
MOST_POSITIONAL_FIELDS = 4
NO_CODE = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.COMMENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def docstring_lines(tree: ast.AST) -> set[int]:
    """Numbers of the lines that docstrings take."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            lines |= set(range(docstring.lineno, docstring.end_lineno + 1))
    return lines


def tokens_and_lines(source: str) -> tuple[int, int]:
    """Tokens of code, and the lines that hold code; docstrings and comments count as neither."""
    documentation = docstring_lines(ast.parse(source))
    code = [
        token
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in NO_CODE and token.start[0] not in documentation
    ]
    lines = {
        number
        for token in code
        for number in range(token.start[0], token.end[0] + 1)
    }  # fmt: skip
    return len(code), len(lines)


def places(source: str, is_wrong) -> list[str]:
    """Lines of a source whose syntax nodes are wrong."""
    lines = source.splitlines()
    return [
        lines[node.lineno - 1].strip() for node in ast.walk(ast.parse(source)) if is_wrong(node)
    ]


def is_packed_assignment(node: ast.AST) -> bool:
    """``a, b = x, y``; a swap of two names is one thought and stays."""
    if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Tuple):
        return False
    if not isinstance(node.value, ast.Tuple):
        return False
    targets = sorted(ast.unparse(element) for element in node.targets[0].elts)
    return targets != sorted(ast.unparse(element) for element in node.value.elts)


def is_nested_conditional(node: ast.AST) -> bool:
    """A conditional expression within another."""
    if not isinstance(node, ast.IfExp):
        return False
    return any(isinstance(inner, ast.IfExp) for inner in ast.walk(node) if inner is not node)


def is_wide_positional_dataclass(node: ast.AST) -> bool:
    """A dataclass of many fields that can be made without naming them."""
    if not isinstance(node, ast.ClassDef):
        return False
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    decorator = next((text for text in decorators if text.startswith("dataclass")), None)
    if decorator is None or "kw_only=True" in decorator:
        return False
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
    fields = [field for field in fields if "ClassVar" not in ast.unparse(field.annotation)]
    return len(fields) > MOST_POSITIONAL_FIELDS


@each_file
def test_file_is_short_has_a_docstring_and_a_telling_name(path):
    source = path.read_text()
    assert source.count("\n") <= MOST_LINES_A_FILE
    assert ast.get_docstring(ast.parse(source))
    assert path.stem not in {"utils", "util", "common", "helpers", "misc"}


@each_file
def test_functions_are_short(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= MOST_LINES_A_FUNCTION, f"{node.name} has {length} lines"


@each_file
@pytest.mark.parametrize(
    "is_wrong",
    [is_packed_assignment, is_nested_conditional, is_wide_positional_dataclass],
    ids=lambda check: check.__name__,
)
def test_one_thought_a_line(path, is_wrong):
    assert not places(path.read_text(), is_wrong)


def test_few_tokens_a_line():
    counts = {path: tokens_and_lines(path.read_text()) for path in FILES}
    tokens = sum(count for count, _ in counts.values())
    lines = sum(count for _, count in counts.values())
    assert tokens / lines <= MOST_TOKENS_A_LINE


@pytest.mark.parametrize(
    ("source", "is_wrong", "count"),
    [
        ("a, b = 1, 'x'", is_packed_assignment, 1),
        ("a, b = b, a", is_packed_assignment, 0),
        ("a, b = pair", is_packed_assignment, 0),
        ("x = 1 if a else 2 if b else 3", is_nested_conditional, 1),
        ("x = 1 if a else 2", is_nested_conditional, 0),
        ("@dataclass(frozen=True)\nclass A:\n a: int\n b: int\n c: int\n d: int\n e: int", is_wide_positional_dataclass, 1),
        ("@dataclass(kw_only=True)\nclass A:\n a: int\n b: int\n c: int\n d: int\n e: int", is_wide_positional_dataclass, 0),
    ],
)  # fmt: skip
def test_the_checks_themselves_see_what_they_look_for(source, is_wrong, count):
    assert len(places(source, is_wrong)) == count


def test_tokens_are_counted_without_docstrings_and_comments():
    source = '"""A module."""\n\n# a comment\nx = 1  # another\ny = f(x)\n'
    assert tokens_and_lines(source) == (3 + 6, 2)
