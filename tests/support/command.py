"""The command `veltrix`, as a process of its own: what a person changes a value with."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

__all__ = ["veltrix_put"]


def veltrix_put(url: str, key: str, value: Any) -> int:
    """`veltrix put KEY VALUE`, and the revision that it tells."""
    command = [sys.executable, "-m", "veltrix_mw.cli", "--url", url, "--json", "put", key, json.dumps(value)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    revision: int = json.loads(done.stdout)["revision"]
    return revision
