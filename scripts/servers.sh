#!/usr/bin/env bash
# Sees to it that the servers which tests, demo and measurements start are on this machine.
#
# Usage: scripts/servers.sh COMMAND...   of: etcd etcdctl redis-server redis-cli openssl promtool wrk
#
# Where one lacks, apt installs its package; without apt or root it says what to install, and fails. A service that
# a package started by itself is stopped again: what is used here is started by whoever uses it, on free ports.
set -euo pipefail

declare -A package=([etcd]=etcd-server [etcdctl]=etcd-client [redis-server]=redis-server [redis-cli]=redis-tools
  [openssl]=openssl [promtool]=prometheus [wrk]=wrk)
declare -A missing=()

for command in "$@"; do
  type -P "$command" >/dev/null || missing[${package[$command]}]=1
done
if [[ ${#missing[@]} == 0 ]]; then
  exit 0
fi

packages=("${!missing[@]}")
root=()
if ! type -P apt-get >/dev/null; then
  echo "Not on this machine: $*. Install what Debian calls ${packages[*]}, then run this again." >&2
  exit 1
fi
if [[ $(id -u) != 0 ]]; then
  if ! type -P sudo >/dev/null; then
    echo "Not on this machine, and no sudo: as root, run: apt-get install ${packages[*]}" >&2
    exit 1
  fi
  root=(sudo)
fi

echo "== installing ${packages[*]}"
"${root[@]}" apt-get update -qq
# policy-rc.d 101: packages start no service of theirs.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
  printf '#!/bin/sh\nexit 101\n' | "${root[@]}" tee "$policy" >/dev/null
  "${root[@]}" chmod 755 "$policy"
  trap '"${root[@]}" rm -f "$policy"' EXIT
fi
"${root[@]}" env DEBIAN_FRONTEND=noninteractive \
  apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null

for command in "$@"; do
  if ! type -P "$command" >/dev/null; then
    echo "$command is not on this machine, although ${package[$command]} was installed." >&2
    exit 1
  fi
done
