#!/usr/bin/env bash
# Install what the test servers need (Slurm with accounting, Ceph's object gateway), a browser and the test
# images, on Debian 12. Does nothing if all is there.
set -euo pipefail

packages=(slurm-wlm slurmdbd munge mariadb-server-core mariadb-client-core iproute2
  ceph-mon ceph-osd ceph-mgr radosgw ceph-common openssl curl dataset-fashion-mnist chromium fonts-dejavu-core)

fail() {
  printf 'tests/setup.sh: %s\n' "$*" >&2
  exit 1
}

command -v dpkg-query >/dev/null || fail "no dpkg here; install by hand what these Debian packages hold: ${packages[*]}"
missing=()
for package in "${packages[@]}"; do
  state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
  [ "$state" = installed ] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0

[ "$(id -u)" = 0 ] || fail "missing: ${missing[*]}. Run tests/setup.sh as root."

# The packages would start system-wide daemons; the tests start their own. Debian asks this file before each start.
# A file that is there already is the administrator's answer, and stays.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
fi

export DEBIAN_FRONTEND=noninteractive
apt-get update -q || fail "apt-get update failed. Check /etc/apt/sources.list and the network; missing: ${missing[*]}"
apt-get install -y -q --no-install-recommends "${missing[@]}" ||
  fail "apt-get install failed. These packages are those of Debian 12; missing: ${missing[*]}"
