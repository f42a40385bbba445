"""The walls of the house: which folder may import which, what requirements.txt declares, and where
things are said once.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement

PACKAGE = "wan_distill"
SCRIPTS = ("train_distillation", "sample", "test_umt5_weights", "convert_lora")
# From the bottom to the top. A file at the top of the package is a floor of its own.
FLOORS = (
    "errors",
    "interrupts",
    "maths",
    "layout",
    "settings",
    "system",
    "umt5",
    "lora",
    "model",
    "data",
    "methods",
    "training",
    "planning",
    "results",
    "commands",
    "scripts",
)
LONGEST = 230
# Imports inside functions are for what a run may not need: torch before the settings are known to
# be right, optional packages, the hub.
FEWER_INNER_IMPORTS_THAN = 40
# Import name -> name on the package index, where they differ.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "imageio_ffmpeg": "imageio"}  # an extra
# Packages that only some flags need: imported inside functions, behind an error that names them.
OPTIONAL = ("bitsandbytes", "datasets")
ADDITIONS = ("cv2",)  # without it a table has a column less
TEST_TOOLS = ("pytest",)  # of a script that pytest collects too
# Where the run folder's paths are named, and the names.
LAYOUT = "wan_distill/layout.py"
PATHS_OF_A_RUN = re.compile(
    r"_lora\.safetensors|_student\.safetensors|best\.safetensors|encoder\.json"
    r"|^(run|evaluation|prompts)\.json$|^(report\.html|README\.md|model_card\.md|plan\.txt)$"
    r"|^(trajectories|anchors|handovers)$"
    r"|^(metrics\.jsonl|comparison\.png|previews|logs|prompts|evaluation)$"
)


@dataclass(frozen=True)
class Import:
    """One imported name, wherever in its file it stands."""

    file: Path
    line: int
    module: str
    """The module or package that is imported; of our own always the deepest one."""
    inside: bool
    """Whether it stands inside a function."""

    def __str__(self) -> str:
        return f"{name_of(self.file)}:{self.line} imports {self.module}"


def product_files() -> list[Path]:
    files = sorted((REPOSITORY / PACKAGE).rglob("*.py"))
    return [*files, *(REPOSITORY / f"{script}.py" for script in SCRIPTS)]


def name_of(file: Path) -> str:
    return file.relative_to(REPOSITORY).as_posix()


def module_of(file: Path) -> str:
    """`wan_distill/data/run.py` -> `wan_distill.data.run`."""
    return ".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@functools.cache
def imports_of(file: Path) -> tuple[Import, ...]:
    """All imports of a file: inside functions, and those for a type checker alone, too."""
    modules = {module_of(f) for f in product_files()}

    def visit(node: ast.AST, inside: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(file, child.lineno, alias.name, inside)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0 and child.module, f"{name_of(file)}: a relative import"
                for alias in child.names:
                    deeper = f"{child.module}.{alias.name}"
                    module = deeper if deeper in modules else child.module
                    yield Import(file, child.lineno, module, inside)
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from visit(child, inside or function)

    return tuple(visit(parsed(file), False))


def floor_of(module: str) -> str | None:
    """The floor that one of our modules belongs to; None for other packages."""
    first, _, rest = module.partition(".")
    if first in SCRIPTS:
        return "scripts"
    if first != PACKAGE or not rest:
        return None
    return rest.partition(".")[0]


def ours() -> list[Import]:
    return [i for file in product_files() for i in imports_of(file) if floor_of(i.module)]


def foreign() -> list[Import]:
    """Imports of other packages than Python's own."""
    return [
        i
        for file in product_files()
        for i in imports_of(file)
        if (name := i.module.partition(".")[0]) not in sys.stdlib_module_names
        and name not in (PACKAGE, *SCRIPTS)
    ]


# ------------------------------------------------------------------------------------------ imports


def test_every_folder_is_on_a_floor_and_every_module_that_is_imported_exists():
    floors = {floor_of(module_of(file)) for file in product_files()} - {None}
    assert floors == set(FLOORS)
    modules = {module_of(file) for file in product_files()}
    assert [str(i) for i in ours() if i.module not in modules] == []


def test_imports_point_down():
    upwards = [
        str(i)
        for i in ours()
        if module_of(i.file) != PACKAGE
        and FLOORS.index(floor_of(i.module)) > FLOORS.index(floor_of(module_of(i.file)))
    ]
    assert upwards == []


def test_no_import_closes_a_circle():
    graph: dict[str, set[str]] = {module_of(file): set() for file in product_files()}
    for i in ours():
        graph[module_of(i.file)].add(i.module)
    assert circle_in(graph) == []


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, in its order; empty where there is none."""
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in done:
            for other in sorted(graph.get(module, ())):
                if circle := walk(other, (*path, module)):
                    return circle
            done.add(module)
        return []

    return next((circle for module in graph if (circle := walk(module, ()))), [])


def test_a_circle_is_noticed():
    assert circle_in(dict(a={"b"}, b={"c"}, c={"b"})) == ["b", "c", "b"]
    assert circle_in(dict(a={"b", "c"}, b={"c"}, c=set())) == []


def test_imports_inside_functions_are_few():
    inner = {
        (name_of(i.file), i.line) for file in product_files() for i in imports_of(file) if i.inside
    }
    assert len(inner) < FEWER_INNER_IMPORTS_THAN, sorted(inner)


# ----------------------------------------------------------------------------------------- packages


def declared() -> dict[str, str]:
    """Package -> its line of requirements.txt."""
    lines = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return {Requirement(line.split("#")[0].strip()).name: line for line in lines if line.strip()}


def test_what_is_imported_is_declared():
    known = {name.replace("_", "-") for name in declared()}
    missing = [
        str(i)
        for i in foreign()
        if (name := i.module.partition(".")[0]) not in (*OPTIONAL, *ADDITIONS, *TEST_TOOLS)
        and DISTRIBUTIONS.get(name, name).replace("_", "-") not in known
    ]
    assert missing == []


def test_what_is_declared_is_used_or_says_why_it_is_there():
    imported = {i.module.partition(".")[0] for i in foreign()}
    used = {DISTRIBUTIONS.get(name, name) for name in imported}
    for name, line in declared().items():
        assert name in used or "#" in line, f"{name}: nothing imports it, and no reason is given"


def test_optional_packages_are_imported_late_and_their_absence_is_explained():
    optional = [i for i in foreign() if i.module.partition(".")[0] in OPTIONAL]
    assert {i.module.partition(".")[0] for i in optional} == set(OPTIONAL)
    assert [str(i) for i in optional if not i.inside] == []
    explained = {
        alias.name
        for file in product_files()
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Try) and catches_import_error(node)
        for statement in node.body
        if isinstance(statement, ast.Import)
        for alias in statement.names
    }
    assert set(OPTIONAL) <= explained


def catches_import_error(node: ast.Try) -> bool:
    """Whether a missing package becomes a UsageError here."""
    return any(
        "ImportError" in ast.unparse(handler.type or ast.Constant(None))
        and any(isinstance(s, ast.Raise) and "UsageError" in ast.unparse(s) for s in handler.body)
        for handler in node.handlers
    )


# ------------------------------------------------------------------------- one thing in one place


def test_no_file_is_longer_than_a_few_screens():
    long = {
        name_of(file): count
        for file in (REPOSITORY / PACKAGE).rglob("*.py")
        if (count := len(file.read_text(encoding="utf-8").splitlines())) > LONGEST
    }
    assert long == {}


def test_methods_are_told_apart_only_where_they_are_defined():
    """Everything else asks the recipe, so that a new method is two files."""
    allowed = (
        "wan_distill/settings/recipes.py",
        "wan_distill/settings/defaults.py",
        "wan_distill/methods/",
    )
    elsewhere = [
        f"{name_of(file)}:{node.lineno}"
        for file in product_files()
        if not name_of(file).startswith(allowed)
        for node in ast.walk(parsed(file))
        if isinstance(node, (ast.Compare, ast.Match)) and compares_the_method(node)
    ]
    assert elsewhere == []


def compares_the_method(node: ast.Compare | ast.Match) -> bool:
    sides = [node.subject] if isinstance(node, ast.Match) else [node.left, *node.comparators]
    return any(
        (isinstance(side, ast.Attribute) and side.attr == "method")
        or (isinstance(side, ast.Name) and side.id == "method")
        for side in sides
    )


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("config.method == 'dmd'", True),
        ("'dmd' != method", True),
        ("self.run.config.method in ('dmd', 'x')", True),
        ("config.methods == 1", False),
    ],
)
def test_a_comparison_of_the_method_is_recognised(code, expected):
    assert compares_the_method(ast.parse(code, mode="eval").body) == expected


def test_paths_of_the_run_folder_are_spelt_in_one_file():
    elsewhere = [
        f"{name_of(file)}:{node.lineno} {node.value!r}"
        for file in product_files()
        if name_of(file) != LAYOUT
        for node in path_strings(parsed(file))
        if PATHS_OF_A_RUN.search(node.value)
    ]
    assert elsewhere == []


def path_strings(tree: ast.Module) -> Iterator[ast.Constant]:
    """String constants that are parts of a path: right of a `/`, or given to Path and to calls that
    name files.
    """
    for node in ast.walk(tree):
        parts: list[ast.AST] = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            parts = [node.right] if isinstance(node.right, (ast.Constant, ast.JoinedStr)) else []
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if re.search(r"(^|\.)(Path|joinpath|with_name|glob|rglob|open)$", called):
                parts = list(node.args)
        for part in parts:
            yield from (
                n for n in ast.walk(part) if isinstance(n, ast.Constant) and type(n.value) is str
            )


def test_a_path_that_is_spelt_is_recognised():
    code = 'a / "run.json"; Path("x") / "metrics.jsonl"; f(b / f"{e}_noise_lora.safetensors")'
    assert [n.value for n in path_strings(ast.parse(code)) if PATHS_OF_A_RUN.search(n.value)] == [
        "run.json",
        "metrics.jsonl",
        "_noise_lora.safetensors",
    ]


# ------------------------------------------------------------------------- what is named and used


FILES = ("py", "json", "html", "css", "js")  # `run.json` is a file


def defined(node: ast.stmt) -> list[str]:
    """The names that a statement of a module or of a class defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def definitions(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """(name, is it a method?) of all that a module defines, but for what Python, pytest or a base
    class of another package calls.
    """
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in tree.body:
        yield from ((name, False) for name in defined(node) if not name.startswith(("__", "test_")))
        if isinstance(node, ast.ClassDef) and all(is_ours(base, classes) for base in node.bases):
            methods = (m for m in node.body if isinstance(m, ast.FunctionDef))
            yield from ((m.name, True) for m in methods if not m.name.startswith("__"))


def is_ours(base: ast.expr, classes: set[str]) -> bool:
    """Whether a base class is one of the same module, or one that has no methods to be replaced."""
    name = ast.unparse(base).split("[")[0].split(".")[-1]
    return name in classes or name in {"Protocol", "NamedTuple", "Exception"} or "Settings" in name


def test_all_that_is_defined_is_used():
    """By the product, a script, a benchmark or a test; a method by its name after a dot."""
    names: set[str] = set()
    attributes: set[str] = set()
    for folder in (PACKAGE, "scripts", "benchmarks", "tests", "."):
        for file in (REPOSITORY / folder).glob("*.py" if folder == "." else "**/*.py"):
            for node in ast.walk(parsed(file)):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                    names.add(node.id)
                elif isinstance(node, ast.Attribute):
                    attributes.add(node.attr)
    unused = [
        f"{name_of(file)}: {name}"
        for file in product_files()
        for name, is_method in definitions(parsed(file))
        if name not in attributes and (is_method or name not in names)
    ]
    assert unused == []


def test_what_docstrings_and_comments_name_exists():
    """Of `module.name`, where there is a module of ours with that name."""
    known: dict[str, set[str]] = {}
    for file in product_files():
        inside = {name for node in parsed(file).body for name in defined(node)}
        known[file.stem] = known.get(file.stem, set()) | inside
    lost = [
        f"{name_of(file)}: {module}.{name}"
        for file in product_files()
        for module, name in re.findall(r"`(\w+)\.(\w+)`", file.read_text(encoding="utf-8"))
        if module in known and name not in known[module] and name not in FILES
    ]
    assert lost == []


# ------------------------------------------------------------------------------------------ the map


def files_on(drawn: str) -> list[str]:
    """The paths of a drawn tree: folders end in a slash, what is below them is indented."""
    folders: list[tuple[int, str]] = []
    files = []
    for line in drawn.splitlines():
        if not (match := re.match(r"( *)([\w./]+)(\s|$)", line)):
            continue
        depth, name = len(match[1]), match[2]
        folders = [folder for folder in folders if folder[0] < depth]
        if name.endswith("/"):
            folders.append((depth, name))
        else:
            files.append("".join(folder for _, folder in folders) + name)
    return files


def test_the_map_names_every_file_once():
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = files_on(text.split("```")[1])
    present = {name_of(file) for file in product_files()}
    assert present - set(listed) == set(), "not on the map of docs/architecture.md"
    python = {name for name in listed if name.endswith(".py")}
    assert python - present == set(), "on the map of docs/architecture.md, but not in the tree"
    assert len(listed) == len(set(listed))


def test_a_drawn_tree_is_understood():
    drawn = "a.py  first\nb/\n  c.py\n  d/   a folder\n    e.py\n  f.py\ng.py"
    assert files_on(drawn) == ["a.py", "b/c.py", "b/d/e.py", "b/f.py", "g.py"]
