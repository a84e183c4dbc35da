#!/usr/bin/env bash
# Runs the suite on the main environment, and on every other Python that this project supports and this machine has.
# Four parts run at a time: they wait for servers more than they compute. No part is begun once one has failed. What
# the first part says is shown as it runs, what the others say once they end. The last lines are pytest's own summaries,
# one a part.
#
# What takes minutes and does not depend on the interpreter is run on the main one alone, as two parts of their own: the
# faults on real servers, their simulation and the cluster's demo; herds, leases, the doctor, what permissions allow, and the
# contract of stores behind a mirror, of several servers or over gRPC, whose parts each Python runs by themselves. The
# package etcd3 has an environment of its own, as it gets on with no protobuf of the last years.
#
# Usage: scripts/suite.sh   (the environment .venv must be there)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

faults=(faults simulation cli/test_demo_cluster.py)
once=(stores/test_mirrored.py stores/test_redis_topologies.py)
once+=(stores/test_etcd_over_grpc.py stores/test_etcd_handed_in.py)
once+=(cli/test_doctor.py cli/test_doctor_rights.py cli/test_doctor_topologies.py)
once+=(test_freshness_client.py test_herd.py test_lazy_mirror.py test_leases.py test_permissions.py telemetry)
at_a_time=4
logs=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$logs"' EXIT
labels=()             # what each part is run on, by its number
declare -A running=() # process id -> number of its part
failed=0
label='
import platform
from importlib.util import find_spec
beside = next(name for name in ("django", "etcd3") if find_spec(name))
from importlib.metadata import version
print(f"Python {platform.python_version()}, {beside} {version(beside)}")
'

# Waits until fewer parts run than `at_a_time`, or than $1.
settle() {
  local pid status number
  while ((${#running[@]} >= ${1:-at_a_time})); do
    status=0
    wait -n -p pid "${!running[@]}" || status=$?
    number=${running[$pid]}
    unset "running[$pid]"
    if ((number > 0)); then
      echo "== tests, run beside others: ${labels[number]}"
      cat "$logs/$number"
    fi
    ((status == 0)) || failed=1
  done
}

# Runs `$1 -m pytest` with the other arguments as a part of its own, once there is room; nothing where one has failed.
run() {
  local python=$1 number=${#labels[@]}
  settle
  if ((failed)); then
    return
  fi
  labels+=("$("$python" -c "$label")")
  if ((number == 0)); then
    echo "== tests: ${labels[0]}"
    ("$python" -m pytest "${@:2}" 2>&1 | tee "$logs/0") & # pipefail: it fails as pytest does
  else
    "$python" -m pytest "${@:2}" >"$logs/$number" 2>&1 &
  fi
  running[$!]=$number
}

main=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
elsewhere=("${faults[@]}" "${once[@]}")
run .venv/bin/python "${elsewhere[@]/#/--ignore=tests/}"
run .venv/bin/python "${faults[@]/#/tests/}"
run .venv/bin/python "${once[@]/#/tests/}"
scripts/environment.sh .venvs/etcd3 etcd3 "" etcd3
run .venvs/etcd3/bin/python tests/etcd3
while read -r version python <&3; do
  case $version in
    "$main") ;;
    3.11 | 3.12 | 3.13)
      scripts/environment.sh ".venvs/$version" test "$python"
      run ".venvs/$version/bin/python" "${elsewhere[@]/#/--ignore=tests/}"
      ;;
  esac
done 3< <(scripts/pythons.sh)
settle 1

if ((failed)); then
  echo "== failed"
else
  echo "== all passed"
fi
for number in "${!labels[@]}"; do
  echo "${labels[number]}: $(tail -n 1 "$logs/$number")"
done
exit "$failed"
