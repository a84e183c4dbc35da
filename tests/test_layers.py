"""The house's rules of import, read from the sources: downwards only, public names only, drivers at their edge.

Read with `ast`, not from what was loaded: imports inside functions count too. Imports under `TYPE_CHECKING` do
not run and load nothing, so layers and drivers do not count them; a private name is private in an annotation too,
so the rule of public names does.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parent.parent
CORE: Final = "veltrix_mw"

# Lowest first. A module imports from its own rank (without a cycle) and from those before it. A name stands for
# the module and all below it.
RANKS: Final[tuple[frozenset[str], ...]] = (
    frozenset(
        {
            "digest",
            "errors",
            "version",
            "faults",
            "events",
            "forking",
            "awaiting",
            "background",
            "keys",
            "pinning",
            "rate",
            "values",
            "instruments",
            "telemetry",
            "words",
        }
    ),
    frozenset({"sorted_map", "snapshot"}),
    frozenset({"operations", "protocols", "settings", "findings", "freshness"}),
    frozenset({"coalesce"}),
    frozenset({"stores", "disk", "disk_probe"}),
    frozenset(
        {
            "validation",
            "keyspace",
            "replica",
            "follower",
            "writer",
            "subscriptions",
            "relay",
            "relay_report",
            "relay_thread",
            "last_changes",
            "lazy",
            "unit_filler",
            "unit_portions",
            "unit_reader",
            "fleet",
            "leases",
        }
    ),
    frozenset(
        {
            "",
            "section",
            "deriving",
            "overrides",
            "memo",
            "lapses",
            "view",
            "counting_view",
            "views",
            "fresh_views",
            "current",
            "status",
            "tier_status",
            "waiters",
            "client",
            "request_layers",
            "wsgi",
            "asgi",
            "testing",
            "diagnosis",
            "pytest_plugin",
        }
    ),  # "" is the package itself
    frozenset({"cli", "admin"}),
)

# What the integrations, cli and admin may import from the core: names in the `__all__` of these.
PUBLIC: Final = frozenset(
    {
        CORE,
        *(
            f"{CORE}.{name}"
            for name in (
                "asgi",
                "wsgi",
                "coalesce",
                "leases",
                "request_layers",
                "testing",
                "diagnosis",
                "words",
                "events",
                "cli",
            )
        ),
    }
)
USERS: Final = (f"{CORE}.cli", f"{CORE}.admin", "flask_veltrix", "django_veltrix", "starlette_veltrix")

# Who may import what is not the core's to depend on.
EDGES: Final[Mapping[str, tuple[str, ...]]] = {
    "sqlite3": (f"{CORE}.stores.sqlite", f"{CORE}.stores.sqlite_file"),
    "redis": (f"{CORE}.stores.redis_link",),
    "grpc": (f"{CORE}.stores.etcd_grpc", f"{CORE}.stores.etcd_adopted"),
    "urllib3": (f"{CORE}.stores.etcd_gateway",),
    "pydantic": (f"{CORE}.validation",),
    "jsonschema": (f"{CORE}.validation",),
    "pytest": (f"{CORE}.pytest_plugin",),
    "click": (f"{CORE}.cli", "flask_veltrix"),
    "rich": (f"{CORE}.cli",),
    "flask": ("flask_veltrix",),
    "werkzeug": ("flask_veltrix",),
    "jinja2": ("flask_veltrix",),
    "django": ("django_veltrix",),
    "asgiref": ("django_veltrix",),
    "starlette": ("starlette_veltrix",),
    "fastapi": ("starlette_veltrix",),
}


@dataclass(frozen=True, slots=True)
class Import:
    """One import, or one use of an imported module's attribute; `typing` where it never runs.

    `name` is empty where the module itself is bound to a name, None where it is only loaded (`import a.b`).
    """

    importer: str
    module: str
    name: str | None
    line: int
    typing: bool

    def __str__(self) -> str:
        what = f"{self.name} from {self.module}" if self.name else self.module
        return f"{self.importer}, line {self.line}: imports {what}"


def violations(root: Path) -> list[str]:
    """Every breach of the rules in the sources below `root`, as a sentence."""
    modules = dict(_modules(root))
    imports = [found for module, path in modules.items() for found in _imports(module, path, modules)]
    faults = [
        f"{module} has no rank: add it to RANKS in tests/test_layers.py, at the lowest place that its imports allow"
        for module in modules
        if _within(module, CORE) and _rank(module) is None
    ]
    for found in imports:
        faults += _upwards(found)
        faults += _private(found, modules)
        faults += _driver(found)
    return sorted(faults) + _cycles(imports, modules)


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    for source in (root / "src", root / "integrations"):
        for path in sorted(source.rglob("*.py")):
            parts = path.relative_to(source).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _imports(module: str, path: Path, modules: Mapping[str, Path]) -> Iterator[Import]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
        for statement in node.body
        for inner in ast.walk(statement)
    }
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        unrun = id(node) in typing
        match node:
            case ast.Import():
                for alias in node.names:
                    if alias.asname:
                        bound[alias.asname] = alias.name
                    yield Import(module, alias.name, "" if alias.asname else None, node.lineno, unrun)
            case ast.ImportFrom():
                parents = package.split(".")
                above = parents[: len(parents) + 1 - node.level] if node.level else []
                source = ".".join([*above, *([node.module] if node.module else [])])
                for alias in node.names:
                    inner = f"{source}.{alias.name}"
                    if inner in modules:
                        bound[alias.asname or alias.name] = inner
                        yield Import(module, inner, "", node.lineno, unrun)
                    else:
                        yield Import(module, source, alias.name, node.lineno, unrun)
            case ast.Call(args=[ast.Constant(value=str(target)), *_]) if ast.unparse(node.func) in {
                "import_module",
                "importlib.import_module",
                "__import__",
            }:
                yield Import(module, target, None, node.lineno, unrun)
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in bound:
                yield Import(module, bound[name], attribute, node.lineno, id(node) in typing)


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _rank(module: str) -> int | None:
    head = module.removeprefix(CORE).removeprefix(".").partition(".")[0]
    return next((rank for rank, heads in enumerate(RANKS) if head in heads), None)


def _upwards(found: Import) -> Iterator[str]:
    if found.typing or not _within(found.importer, CORE):
        return
    if found.module.partition(".")[0] in {user.partition(".")[0] for user in USERS} - {CORE}:
        yield f"{found}: the core knows no framework"
    if _within(found.module, CORE):
        mine, other = _rank(found.importer), _rank(found.module)
        if mine is not None and other is not None and other > mine:
            yield f"{found}: imports run downwards only, and that is {other - mine} up"


def _private(found: Import, modules: Mapping[str, Path]) -> Iterator[str]:
    user = next((user for user in USERS if _within(found.importer, user)), None)
    if user is None or not _within(found.module, CORE) or _within(found.module, user):
        return
    if found.module not in PUBLIC:
        yield f"{found}: not a public module"
    elif found.name is None:
        yield f"{found}: write `from {found.module} import name`, so that the name can be checked"
    elif found.name and found.name not in _exported(modules.get(found.module)):
        yield f"{found}: not in its __all__"


def _exported(path: Path | None) -> frozenset[str]:
    """The strings in the module's `__all__`, also of lists that are added or unpacked in it."""
    if path is None:
        return frozenset()
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            names |= {
                inner.value
                for inner in ast.walk(node)
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str)
            }
    return frozenset(names)


def _driver(found: Import) -> Iterator[str]:
    allowed = EDGES.get(found.module.partition(".")[0])
    if allowed and not found.typing and not any(_within(found.importer, edge) for edge in allowed):
        yield f"{found}: only {' and '.join(allowed)} may"


def _cycles(imports: list[Import], modules: Mapping[str, Path]) -> list[str]:
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for found in imports:
        if not found.typing and found.module in modules and found.module != found.importer:
            graph[found.importer].add(found.module)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [f"a cycle of imports: {' <- '.join(error.args[1])}"]
    return []


def test_the_sources_keep_the_rules() -> None:
    assert dict(_modules(ROOT)).keys() >= {f"{CORE}.errors", f"{CORE}.snapshot"}, "the sources were not found"
    faults = violations(ROOT)
    assert not faults, "\n".join(faults)


def _tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


GOOD: Final = {
    "src/veltrix_mw/__init__.py": "from veltrix_mw.view import View\n__all__ = ['View']\n",
    "src/veltrix_mw/errors.py": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from veltrix_mw.snapshot import Entry\n"
    ),
    "src/veltrix_mw/snapshot.py": "from .errors import A\n",
    "src/veltrix_mw/stores/__init__.py": "",
    "src/veltrix_mw/stores/redis.py": "from .redis_link import Link\nfrom ..errors import A\n",
    "src/veltrix_mw/stores/redis_link.py": "import redis.client\n",
    "src/veltrix_mw/view.py": "import veltrix_mw.snapshot\ndef late():\n    from veltrix_mw.stores import redis\n",
    "src/veltrix_mw/asgi.py": "__all__ = ['Middleware']\n",
    "src/veltrix_mw/cli/__init__.py": "import click\nfrom veltrix_mw import View\nfrom .verbs import put\n",
    "src/veltrix_mw/cli/verbs.py": "",
    "integrations/flask_veltrix/__init__.py": "import flask\nfrom veltrix_mw import View\nfrom . import config\n",
    "integrations/flask_veltrix/config.py": "",
}


def test_a_tree_that_keeps_the_rules_passes(tmp_path: Path) -> None:
    assert violations(_tree(tmp_path, GOOD)) == []


@pytest.mark.parametrize(
    ("path", "text", "fault"),
    [
        (
            "src/veltrix_mw/errors.py",
            "from veltrix_mw.view import View",
            "imports run downwards only, and that is 6 up",
        ),
        ("src/veltrix_mw/errors.py", "from .view import View", "errors, line 1: imports View from veltrix_mw.view"),
        ("src/veltrix_mw/errors.py", "from . import view", "imports veltrix_mw.view: imports run downwards"),
        ("src/veltrix_mw/errors.py", "def late():\n    import veltrix_mw.view", "line 2: imports veltrix_mw.view"),
        ("src/veltrix_mw/errors.py", "import importlib\nimportlib.import_module('veltrix_mw.view')", "downwards only"),
        ("src/veltrix_mw/stores/redis.py", "from ..cli import main", "downwards only, and that is 3 up"),
        ("src/veltrix_mw/view.py", "import flask_veltrix", "the core knows no framework"),
        ("src/veltrix_mw/view.py", "import django.conf", "imports django.conf: only django_veltrix may"),
        ("src/veltrix_mw/stores/memory.py", "def late():\n    import redis", "only veltrix_mw.stores.redis_link may"),
        ("src/veltrix_mw/fresh.py", "", "veltrix_mw.fresh has no rank: add it to RANKS in tests/test_layers.py"),
        ("src/veltrix_mw/keys.py", "from veltrix_mw.values import a", None),
        ("src/veltrix_mw/cli/verbs.py", "from veltrix_mw.snapshot import Snapshot", "not a public module"),
        ("integrations/flask_veltrix/config.py", "from veltrix_mw import Hidden", "not in its __all__"),
        ("integrations/flask_veltrix/config.py", "import veltrix_mw", "write `from veltrix_mw import name`"),
        ("integrations/flask_veltrix/config.py", "from veltrix_mw import view", "not a public module"),
        ("integrations/flask_veltrix/config.py", "from veltrix_mw import asgi\nasgi.Middleware", None),
        ("integrations/flask_veltrix/config.py", "from veltrix_mw import asgi\nasgi.hidden", "line 2: imports hidden"),
        ("integrations/flask_veltrix/config.py", "import veltrix_mw as v\nv.hidden", "line 2: imports hidden"),
        (
            "integrations/flask_veltrix/config.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from veltrix_mw.view import View",
            "line 3: imports View from veltrix_mw.view: not a public module",
        ),
        ("integrations/flask_veltrix/config.py", "import django", "only django_veltrix may"),
    ],
)
def test_a_breach_is_found_and_named(tmp_path: Path, path: str, text: str, fault: str | None) -> None:
    faults = violations(_tree(tmp_path, {**GOOD, path: text}))
    if fault is None:
        assert faults == []
    else:
        assert len(faults) >= 1
        assert any(fault in found for found in faults), faults


def test_a_cycle_within_a_rank_is_found(tmp_path: Path) -> None:
    cycle = {"src/veltrix_mw/keys.py": "import veltrix_mw.values", "src/veltrix_mw/values.py": "import veltrix_mw.keys"}
    (fault,) = violations(_tree(tmp_path, {**GOOD, **cycle}))
    assert fault.startswith("a cycle of imports: veltrix_mw.")
