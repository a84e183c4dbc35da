#!/usr/bin/env bash
# Runs the suite on the main environment, then on every other Python that this project supports and this machine has.
# Two parts run at a time: they wait for servers more than they compute. Stops after the first two of which one fails.
# The last lines are pytest's own summaries, one a part.
#
# What takes minutes and does not depend on the interpreter is run on the main one alone, as a part of its own: the
# faults on real servers, their simulation, the cluster's demo, and the contract of stores behind a mirror, whose parts
# each Python runs by themselves.
#
# Usage: scripts/suite.sh   (the environment .venv must be there)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

once=(faults simulation cli/test_demo_cluster.py stores/test_mirrored.py)
logs=$(mktemp -d)
beside=
trap '[[ -z $beside ]] || kill "$beside" 2>/dev/null || true; rm -rf "$logs"' EXIT
summaries=()

label() {
  "$1" -c 'import platform, django; print(f"Python {platform.python_version()}, Django {django.__version__}")'
}

# Runs one command, or two of which the second one's output comes last; each is a Python and its arguments in one word.
run() {
  local failed=0 each
  local -a first second labels
  read -ra first <<<"$1"
  labels=("$(label "${first[0]}")")
  if (($# > 1)); then
    read -ra second <<<"$2"
    labels+=("$(label "${second[0]}")")
    "${second[@]}" >"$logs/1" 2>&1 &
    beside=$!
  fi
  echo "== tests: ${labels[0]}"
  "${first[@]}" 2>&1 | tee "$logs/0" || failed=1
  if (($# > 1)); then
    wait "$beside" || failed=1
    beside=
    echo "== tests, run beside it: ${labels[1]}"
    cat "$logs/1"
  fi
  for each in "${!labels[@]}"; do
    summaries+=("${labels[each]}: $(tail -n 1 "$logs/$each")")
  done
  if ((failed)); then
    printf '%s\n' "== failed" "${summaries[@]}"
    exit 1
  fi
}

main=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
run ".venv/bin/python -m pytest ${once[*]/#/--ignore=tests/}" ".venv/bin/python -m pytest ${once[*]/#/tests/}"

others=()
while read -r version python <&3; do
  case $version in
    "$main") ;;
    3.11 | 3.12 | 3.13)
      scripts/environment.sh ".venvs/$version" test "$python"
      others+=(".venvs/$version/bin/python -m pytest ${once[*]/#/--ignore=tests/}")
      ;;
  esac
done 3< <(scripts/pythons.sh)
for ((at = 0; at < ${#others[@]}; at += 2)); do
  run "${others[@]:at:2}"
done

echo "== all passed"
printf '%s\n' "${summaries[@]}"
