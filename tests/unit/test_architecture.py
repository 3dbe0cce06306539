"""The plan of the house (`house.py`), enforced: who may import whom, how long a file may be, what a
module shows, what it may not do.

It reads the source with `ast` and runs nothing of it, but for the last tests, which import the
package in a fresh interpreter. Function-level and TYPE_CHECKING imports count like all others.
"""

import ast
import functools
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .house import (
    CORE_PATH,
    LIBRARY_IS_USED_BY,
    MAX_CORE_LINES,
    MAX_FILE_LINES,
    MAX_IMPORT_SECONDS,
    MAY_IMPORT,
    MAY_NOT_USE,
    READS_THE_ENVIRONMENT,
)

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "pellucid"


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Dotted name below the package -> syntax tree: "kv.manager", "kv" for its __init__, "pellucid"
    for the root.
    """
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__") or "pellucid"
        found[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return found


def room(module: str) -> str:
    return module.partition(".")[0]


def is_package(module: str) -> bool:
    return module == "pellucid" or (PACKAGE / module.replace(".", "/")).is_dir()


def imports(module: str) -> Iterator[tuple[str, int]]:
    """Every import of a module as (absolute dotted name, line); a module of ours that is imported
    by name counts as itself.
    """
    own = ["pellucid"] if module == "pellucid" else ["pellucid", *module.split(".")]
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            # "from . import x" stays inside a package, and climbs from a module
            drop = node.level - is_package(module)
            base = own[: len(own) - drop] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                full = f"{source}.{alias.name}"
                ours = full.removeprefix("pellucid.") in modules() or full == "pellucid._native"
                yield (full if ours else source), node.lineno


def house_imports(module: str) -> Iterator[tuple[str, int]]:
    """The imports that stay in the house, named as in the table."""
    for name, line in imports(module):
        if name == "pellucid" or name.startswith("pellucid."):
            yield name.removeprefix("pellucid."), line


def covers(entry: str, module: str) -> bool:
    return module == entry or module.startswith(f"{entry}.")


def calls(tree: ast.Module, function: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == function
        ):
            yield node


def bound_names(tree: ast.Module) -> tuple[set[str], set[str]]:
    """(all names that the module's top level binds, its public classes and functions)."""
    bound, public = set(), set()
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
            if not node.name.startswith("_"):
                public.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name for target in targets for name in ast.walk(target)]
            bound |= {name.id for name in names if isinstance(name, ast.Name)}
        elif isinstance(node, ast.If | ast.Try):
            inside = [child for child in ast.walk(node) if child is not node]
            pending += [child for child in inside if isinstance(child, ast.stmt)]
    return bound, public


def declared_all(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id == "__all__":
                return list(ast.literal_eval(node.value))
    return None


def source_files() -> list[Path]:
    folders = (ROOT / name for name in ("src", "csrc", "tests", "scripts", "examples"))
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return sorted(
        path
        for path in files
        if path.suffix in {".py", ".pyi", ".cpp", ".h", ".hpp"} or path.parent.name == "scripts"
    )


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


# ---- who imports whom


def test_every_room_has_a_row_in_the_table_and_is_a_package() -> None:
    assert {room(module) for module in modules()} <= set(MAY_IMPORT)
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_import_arrows_follow_the_table() -> None:
    wrong = []
    for module in modules():
        allowed = (room(module), *MAY_IMPORT.get(module, MAY_IMPORT[room(module)]))
        wrong += [
            f"{module}:{line} imports {name}"
            for name, line in house_imports(module)
            if not any(covers(entry, name) for entry in allowed)
        ]
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_a_private_name_of_another_module() -> None:
    wrong = []
    allowed = ("_native", "__version__")
    for module, tree in modules().items():
        imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        for node in imported:
            if node.level or (node.module or "").startswith("pellucid"):
                names = [a.name for a in node.names if a.name.startswith("_")]
                wrong += [f"{module}:{node.lineno} imports {n}" for n in names if n not in allowed]
    assert not wrong, "\n".join(wrong)


def test_libraries_are_used_only_in_their_rooms() -> None:
    wrong = []
    for module in modules():
        for name, line in imports(module):
            library = room(name)
            rooms = LIBRARY_IS_USED_BY.get(library, (room(module),))
            banned = library in MAY_NOT_USE.get(room(module), ()) and module != "kv.storage"
            if banned or room(module) not in rooms:
                wrong.append(f"{module}:{line} imports {library}")
    assert not wrong, "\n".join(wrong)


# ---- budgets


def test_no_file_is_longer_than_the_budget() -> None:
    lines = {str(path.relative_to(ROOT)): num_lines(path) for path in source_files()}
    assert {file: n for file, n in lines.items() if n > MAX_FILE_LINES} == {}


def test_the_core_path_can_be_read_in_a_morning() -> None:
    files = {pattern: sorted(PACKAGE.glob(pattern)) for pattern in CORE_PATH}
    assert all(files.values()), "a file of the core path has gone; name the one that took its place"
    assert sum(num_lines(path) for paths in files.values() for path in paths) < MAX_CORE_LINES


# ---- what a module shows, and what it may not do


def test_every_module_says_what_it_is() -> None:
    silent = [module for module, tree in modules().items() if not ast.get_docstring(tree)]
    for path in source_files():
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".cpp", ".h", ".hpp") and not text.startswith("// "):
            silent.append(path.name)
        elif (
            path.suffix == ".py"
            and PACKAGE not in path.parents
            and not ast.get_docstring(ast.parse(text))
        ):
            silent.append(str(path.relative_to(ROOT)))
    assert silent == []


def test_all_lists_exactly_the_public_classes_and_functions_and_names_that_exist() -> None:
    wrong = []
    for module, tree in modules().items():
        listed = declared_all(tree)
        bound, public = bound_names(tree)
        if listed is None:
            wrong.append(f"{module} has no __all__")
            continue
        wrong += [
            f"{module}.{name} is public and not in __all__" for name in sorted(public - set(listed))
        ]
        wrong += [
            f"{module}.__all__ lists {name}, which is not there"
            for name in sorted(set(listed) - bound)
        ]
        wrong += [
            f"{module}.__all__ lists {name} twice"
            for name in sorted({name for name in listed if listed.count(name) > 1})
        ]
    assert not wrong, "\n".join(wrong)


def test_only_the_command_line_prints() -> None:
    wrong = [
        f"{m}:{node.lineno} prints"
        for m, tree in modules().items()
        if room(m) != "cli"
        for node in calls(tree, "print")
    ]
    assert not wrong, "\n".join(wrong)


def test_the_environment_is_read_by_the_command_line_and_for_the_place_of_caches() -> None:
    wrong = []
    for module, tree in modules().items():
        if any(covers(entry, module) for entry in READS_THE_ENVIRONMENT):
            continue
        for node in ast.walk(tree):
            by_attribute = isinstance(node, ast.Attribute) and node.attr in (
                "environ",
                "environb",
                "getenv",
                "putenv",
            )
            by_name = (
                isinstance(node, ast.ImportFrom)
                and node.module == "os"
                and {a.name for a in node.names} & {"environ", "getenv"}
            )
            if by_attribute or by_name:
                wrong.append(f"{module}:{node.lineno}")  # type: ignore[attr-defined]
    assert not wrong, "\n".join(wrong)


def test_nothing_is_guessed_by_attribute_evaluated_or_kept_in_globals() -> None:
    wrong = []
    for module, tree in modules().items():
        for function in ("hasattr", "eval", "exec", "compile", "__import__"):
            wrong += [f"{module}:{node.lineno} calls {function}" for node in calls(tree, function)]
        wrong += [
            f"{module}:{node.lineno} calls getattr with a default"
            for node in calls(tree, "getattr")
            if len(node.args) > 2
        ]
        wrong += [
            f"{module}:{node.lineno} has a global statement"
            for node in ast.walk(tree)
            if isinstance(node, ast.Global)
        ]
    assert not wrong, "\n".join(wrong)


# ---- documents


def test_the_map_of_the_house_has_a_phrase_for_every_file_and_no_other() -> None:
    rows = re.findall(
        r"^\| `([\w/]+\.\w+)` \| \S.*\|$",
        (ROOT / "docs" / "design.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    files = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }
    files |= {str(path.relative_to(PACKAGE)) for path in PACKAGE.glob("server/static/*")}
    files |= {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")} | {
        "__init__.py"
    }
    assert sorted(rows) == sorted(files)


# ---- importing

PROBE = """
import json, sys, threading, time
noise = []
def listen(event, args):
    if event.startswith(("socket.", "subprocess.", "urllib.", "os.system", "os.fork", "os.exec",
                         "os.posix_spawn")):
        noise.append(event)
sys.addaudithook(listen)
threading.setprofile(lambda *_: noise.append("a thread"))  # called in every thread that begins
start = time.process_time()  # of this process alone: the machine may be busy
import {name}
seconds = time.process_time() - start
loaded = sorted({{module.partition(".")[0] for module in sys.modules}})
print(json.dumps({{"seconds": seconds, "noise": noise, "threads": threading.active_count(),
                  "loaded": loaded}}))
"""
HEAVY = {
    "numpy",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "jinja2",
    "click",
    "tqdm",
    "asyncio",
}


def probe(name: str) -> dict[str, object]:
    """Import `name` in a fresh interpreter where a warning is an error, and tell what happened."""
    command = [sys.executable, "-W", "error", "-c", PROBE.format(name=name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, object] = json.loads(done.stdout)
    return report


def test_importing_the_package_is_fast_and_touches_nothing() -> None:
    reports = [probe("pellucid") for _ in range(3)]
    assert (
        statistics.median(float(str(report["seconds"])) for report in reports) < MAX_IMPORT_SECONDS
    )
    for report in reports:
        assert report["noise"] == []
        assert report["threads"] == 1
        assert (
            HEAVY & set(list(report["loaded"] if isinstance(report["loaded"], list) else ()))
            == set()
        )


@pytest.mark.parametrize("name", ["scheduler", "kv.manager"])
def test_rooms_without_arrays_load_no_array_library_by_a_back_door(name: str) -> None:
    loaded = probe(f"pellucid.{name}")["loaded"]
    assert isinstance(loaded, list) and not {"numpy", "torch"} & set(loaded)
