"""Checks that every public name has a type that every type checker reads alike.

Runs `pyright --verifytypes` on the installed packages and keeps what concerns the public modules: what they export,
its members, and, since a type made of unknown ones is unknown, all that these are made of. The private modules are
mypy's and pyright's ordinary concern. Exits 1 and names each fault.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

PUBLIC: Final = {
    "veltrix_mw": (
        "veltrix_mw",
        "veltrix_mw.asgi",
        "veltrix_mw.wsgi",
        "veltrix_mw.coalesce",
        "veltrix_mw.leases",
        "veltrix_mw.testing",
    ),
    "flask_veltrix": ("flask_veltrix",),
    "django_veltrix": ("django_veltrix",),
    "starlette_veltrix": ("starlette_veltrix",),
}


def report(package: str) -> dict[str, Any]:
    """What pyright says of an installed package, as it prints it with --outputjson."""
    # Only here does pyright heed no --pythonpath: it asks the `python` that is first on PATH where packages are.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--ignoreexternal", "--verifytypes", package],
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def faults(found: dict[str, Any], modules: tuple[str, ...]) -> Iterator[str]:
    """Each public name whose type is unknown or ambiguous, as a sentence; also a module that is not there."""
    complete = found.get("typeCompleteness", {})
    there = {module["name"] for module in complete.get("modules", ())}
    yield from (f"{module}: not found by pyright (installed? py.typed?)" for module in modules if module not in there)
    symbols = complete.get("symbols", ())
    exported = {name for symbol in symbols if (name := symbol["name"]).rpartition(".")[0] in modules}
    # A class is listed again under the module that defines it, and there with its members.
    exported |= {symbol["name"] for symbol in symbols if exported & {*symbol.get("alternateNames", ())}}
    for symbol in symbols:
        if symbol["isTypeKnown"] and not symbol["isTypeAmbiguous"]:
            continue
        name = symbol["name"]
        if name in exported or (name.rpartition(".")[0] in exported and _is_public(name)):
            told = [diagnostic["message"].replace("\xa0", " ") for diagnostic in symbol["diagnostics"]]
            yield f"{name}: " + ("; ".join(told) or "made of something whose type is unknown or ambiguous")


def _is_public(name: str) -> bool:
    last = name.rpartition(".")[2]
    return not last.startswith("_") or last.startswith("__")


def main() -> int:
    found = [fault for package, modules in PUBLIC.items() for fault in faults(report(package), modules)]
    print("\n".join(found) or f"pyright --verifytypes: every public name of {', '.join(PUBLIC)} has a known type")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
