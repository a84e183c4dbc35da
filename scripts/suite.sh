#!/usr/bin/env bash
# Runs the whole suite on the main environment, then on every other Python that this project supports and this
# machine has. Stops at the first that fails. The last lines are pytest's own summaries, one a Python.
#
# What takes minutes and does not depend on the interpreter is run on the main one alone: the faults on real servers,
# their simulation, the cluster's demo, and the contract of stores behind a mirror, whose parts each Python runs by
# themselves.
#
# Usage: scripts/suite.sh   (the environment .venv must be there)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

log=$(mktemp)
trap 'rm -f "$log"' EXIT
summaries=()
once=(faults simulation cli/test_demo_cluster.py stores/test_mirrored.py)

run() {
  local label
  label=$("$1" -c 'import platform, django; print(f"Python {platform.python_version()}, Django {django.__version__}")')
  echo "== tests: $label"
  "$@" 2>&1 | tee "$log"
  summaries+=("$label: $(tail -n 1 "$log")")
}

run .venv/bin/python -m pytest
main=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')

while read -r version python <&3; do
  case $version in
    "$main") ;;
    3.11 | 3.12 | 3.13)
      scripts/environment.sh ".venvs/$version" test "$python"
      run ".venvs/$version/bin/python" -m pytest "${once[@]/#/--ignore=tests/}"
      ;;
  esac
done 3< <(scripts/pythons.sh)

echo "== all passed"
printf '%s\n' "${summaries[@]}"
