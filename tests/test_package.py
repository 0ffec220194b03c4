"""What holds of the package's source as a whole: imports go one way, files can be read in one go, and what is private
to other packages stands in one file."""

import ast
import inspect
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import gpytorch
import linear_operator
import pytest
import torch
from linear_operator.operators import LinearOperator
from linear_operator.operators.block_linear_operator import BlockLinearOperator
from torch import nn

import ntk_gp
from ntk_gp import _compat

pytestmark = [pytest.mark.engine_independent, pytest.mark.cpu_only, pytest.mark.every_case]

ROOT = Path(ntk_gp.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
COMPAT = Path(_compat.__file__)


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def named(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", FILES, ids=named)
def test_is_read_in_one_go(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 500


# Imports.


def module_of(file: Path) -> str:
    *folders, name = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(folders if name == "__init__" else [*folders, name])


MODULES = {module_of(file): file for file in FILES}


def imported(file: Path) -> set[str]:
    """The files of the package that a file imports, wherever in it."""
    package = module_of(file).split(".")[: None if file.name == "__init__.py" else -1]
    names = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            full_names = {f"{origin}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else origin for name in full_names}
    return (names & MODULES.keys()) - {module_of(file)}


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Names that import one another, each the next and the last the first; empty where there are none."""
    left = {name: set(others) for name, others in imports.items()}
    while ends := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in ends}
    path = [min(left)] if left else []
    while path and path[-1] not in path[:-1]:
        path.append(min(left[path[-1]] & left.keys()))
    return path[path.index(path[-1]) + 1 :] if path else []


def test_circles_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": {"d"}, "d": {"b"}, "e": {"a"}}) == ["c", "d", "b"]


def test_imports_go_one_way():
    assert circle({name: imported(file) for name, file in MODULES.items()}) == []


# Private names.


def is_private(name: str) -> bool:
    return len(name) > 1 and name[0] == "_" != name[1]


def defined(files: Iterable[Path]) -> set[str]:
    """The private names of functions, classes, variables and attributes of their own that files define."""
    names = set()
    for node in (node for file in files for node in ast.walk(tree(file))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own_object(node.value):
            names.add(node.attr)
    return set(filter(is_private, names))


def is_attribute(text: str) -> bool:
    """Whether it can be the name of a private attribute of another package's."""
    return is_private(text) and text.isidentifier() and not text.startswith("_ntk_gp")


def is_own_object(node: ast.expr) -> bool:
    return ast.unparse(node) in ("self", "cls", "super()")


OURS = defined(file for file in FILES if file != COMPAT)
# What a linear operator's class leaves to its subclasses: its methods, not its attributes.
LEFT_TO_SUBCLASSES = {
    name
    for kind in (LinearOperator, BlockLinearOperator)
    for name, value in vars(kind).items()
    if is_private(name) and inspect.isfunction(value)
}


@cache
def theirs() -> set[str]:
    """Private names of what torch, gpytorch and linear_operator hand out."""
    sources = (file for package in (gpytorch, linear_operator) for file in Path(package.__file__).parent.rglob("*.py"))
    objects = (torch.Tensor, torch.autograd.Function, torch.distributions.Normal(0.0, 1.0), nn.Module())
    return defined(sources) | {name for each in objects for name in dir(each) if is_private(name)}


def private_names(module: ast.Module) -> Iterator[tuple[int, str]]:
    """The line and name of whatever is private to another package: imported, called or read; also in a string, or as a
    keyword's name, by which attributes can be set as well."""
    pieces = {id(piece) for node in ast.walk(module) if isinstance(node, ast.JoinedStr) for piece in node.values}
    for node in ast.walk(module):
        if id(node) in pieces:  # of a name that is put together
            continue
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
            origin = getattr(node, "module", "")
            for alias in node.names:
                if any(map(is_private, f"{origin}.{alias.name}".split("."))):
                    yield node.lineno, f"{origin}.{alias.name}".lstrip(".")
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in LEFT_TO_SUBCLASSES:
            if node.attr not in OURS or (node.attr in theirs() and not is_own_object(node.value)):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Constant | ast.keyword):
            name = node.value if isinstance(node, ast.Constant) else node.arg
            if isinstance(name, str) and is_attribute(name) and name not in OURS | LEFT_TO_SUBCLASSES:
                yield node.lineno, name


@pytest.mark.parametrize(
    "line",
    [
        "from torch.overrides import _pop_mode",
        "import torch._dynamo",
        "import torch._dynamo as dynamo",
        "from linear_operator.functions._matmul import Matmul",
        "torch._C",
        "tensor._version == self._version",
        "setting._global_value = 1",
        "self._linear_op",
        "getattr(node, '_saved_dim')",
        "vars(module).update(_buffers={})",
    ],
)
def test_private_names_are_found(line):
    assert len(list(private_names(ast.parse(line)))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "from ._compat import saved_dim",
        "self._version",
        "matrix._matmul(rhs)",
        "super()._apply(f)",
        "x.__dict__",
        "'_ntk_gp'",
        "f'{name}_constraint'",
    ],
)
def test_other_names_are_not(line):
    assert list(private_names(ast.parse(line))) == []


@pytest.mark.parametrize("file", [file for file in FILES if file != COMPAT], ids=named)
def test_private_names_stand_in_one_file(file):
    """Elsewhere, import what `ntk_gp/_compat.py` makes of one."""
    assert list(private_names(tree(file))) == []


# The one file.


def offered() -> dict[str, str | None]:
    """The public names that it defines, each with the text below it."""
    names: dict[str, str | None] = {}
    body = tree(COMPAT).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef):
            names[node.name] = ast.get_docstring(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                names |= {each.id: text for each in ast.walk(target) if isinstance(each, ast.Name)}
    return {name: text for name, text in names.items() if not is_private(name)}


@pytest.mark.parametrize("name", offered())
def test_a_name_says_what_it_stands_for_and_what_else_would_do(name):
    text = offered()[name] or ""
    assert "`" in text
    assert "ithout" in text


@cache
def used(file: Path) -> set[str]:
    """What it imports from somewhere, by name, and reads of `_compat`."""
    imported = {alias.name for node in ast.walk(tree(file)) if isinstance(node, ast.ImportFrom) for alias in node.names}
    attributes = (node for node in ast.walk(tree(file)) if isinstance(node, ast.Attribute))
    return imported | {node.attr for node in attributes if ast.unparse(node.value) == "_compat"}


@pytest.mark.parametrize("name", offered())
def test_a_name_is_used_and_tested(name):
    uses = {file for file in [*FILES, Path(__file__).parent / "test_compat.py"] if name in used(file)}
    assert any(file.name == "test_compat.py" for file in uses)
    assert len(uses) > 1
