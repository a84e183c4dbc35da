#!/usr/bin/env bash
# Makes a virtual environment that holds this project: editable, with the extra `all` or another, and one dependency group.
#
# Usage: scripts/environment.sh DIRECTORY GROUP [PYTHON [EXTRA]]
#
# Does nothing when pyproject.toml is as it was the last time. Without PYTHON, the best one that pythons.sh
# finds; where no Python is usable, and only then, apt installs what lacks. pip's own configuration decides
# where packages come from.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

directory=$1 group=$2 python=${3:-} extra=${4:-all}

install_python() {
  local -a root=() packages=(python3 python3-venv)
  local version
  for version in 3.13 3.12 3.11; do
    # Debian keeps ensurepip of its python3.N in python3.N-venv.
    if "/usr/bin/python$version" -c "" 2>/dev/null; then
      packages=("python$version" "python$version-venv")
      break
    fi
  done
  if ! type -P apt-get >/dev/null; then
    echo "No usable Python: install Python 3.11 or newer, with venv and ensurepip, then run this again." >&2
    exit 1
  fi
  if [[ $(id -u) != 0 ]]; then
    if ! type -P sudo >/dev/null; then
      echo "No usable Python, and no sudo: as root, run: apt-get install ${packages[*]}" >&2
      exit 1
    fi
    root=(sudo)
  fi
  echo "No usable Python here: installing ${packages[*]}" >&2
  "${root[@]}" apt-get update -qq >&2
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${packages[@]}" >&2
}

best_python() {
  local found
  found=$(scripts/pythons.sh)
  found=${found%%$'\n'*}
  echo "${found#* }"
}

# The path is part of the stamp: an environment that was moved with its clone points to the old place.
want=$( (pwd && cat pyproject.toml scripts/environment.sh) | sha256sum | cut -d " " -f 1)
stamp="$directory/stamp-$group"
if "$directory/bin/python" -c "" 2>/dev/null; then
  if [[ -f $stamp && $(<"$stamp") == "$want" ]]; then
    exit 0
  fi
else
  if [[ -z $python ]]; then
    python=$(best_python)
  fi
  if [[ -z $python ]]; then
    install_python
    python=$(best_python)
  fi
  if [[ -z $python ]]; then
    echo "No usable Python: one of 3.11 or newer with ensurepip, sqlite3 and ssl is needed." >&2
    exit 1
  fi
  echo "== $directory: $("$python" -V)"
  rm -rf "$directory"
  "$python" -m venv "$directory"
fi

echo "== $directory: installing veltrix-mw and the group $group"
pip=("$directory/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install --quiet --upgrade "pip>=25.1" # the first that knows --group
"${pip[@]}" install --quiet --editable ".[$extra]" --group "$group"
echo "$want" >"$stamp"
