#!/usr/bin/env bash
# Prints the usable Pythons of this machine, one a minor version, the best first: "3.13 /usr/bin/python3.13".
#
# Usable: a release that runs, with ensurepip (Debian packs it apart), sqlite3 and ssl. The versions that the
# suite is run on come first, newest first; a newer Python serves only where none of them is.
# Knows nothing of environments. Prints nothing when there is no usable Python.
set -euo pipefail

probe='
import sys
assert sys.version_info >= (3, 11) and sys.version_info.releaselevel == "final"
import ensurepip, sqlite3, ssl, venv
print("%d.%d" % sys.version_info[:2], getattr(sys, "_base_executable", sys.executable))
'

for version in 3.13 3.12 3.11 3.14 3.15; do
  # The version managers come by name too: their shims on PATH refuse to run a version that is not selected.
  for candidate in \
    "/usr/bin/python$version" \
    "/usr/local/bin/python$version" \
    "$(type -P "python$version" || true)" \
    "${PYENV_ROOT:-${HOME:-/root}/.pyenv}/versions/$version".*/bin/"python$version" \
    "${HOME:-/root}/.local/share/uv/python/cpython-$version".*/bin/"python$version" \
    "$(type -P python3 || true)"; do
    [[ -x $candidate ]] || continue
    found=$("$candidate" -c "$probe" 2>/dev/null) || continue
    [[ ${found%% *} == "$version" ]] || continue
    echo "$found"
    break
  done
done
