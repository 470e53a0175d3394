#!/bin/sh
# Installs SLURM for tests/cluster, and libfaketime for tests/faults, from Debian's packages: as root, on Debian, Ubuntu
# and their like.
#
#   sh scripts/install-slurm.sh                  fails where it cannot be installed
#   sh scripts/install-slurm.sh --if-possible    says so and goes on, as those tests are then skipped with the reason
#
# What is installed already is left as it is. Nothing is configured: the tests bring a configuration of their own.
set -eu

commands="slurmctld slurmd sbatch srun scontrol munged ip unshare nsenter setpriv faketime"
packages="slurmctld slurmd slurm-client munge iproute2 util-linux faketime"

missing() {
  for command in $commands; do
    command -v "$command" >/dev/null 2>&1 || printf '%s ' "$command"
  done
}

give_up() {
  echo "SLURM is not installed: $1" >&2
  if [ "$optional" ] && [ "${CI:-}" != true ]; then
    echo "the tests in tests/cluster will be skipped" >&2
    exit 0
  fi
  exit 1
}

optional=
case "${1:-}" in
  --if-possible) optional=yes ;;
  '') ;;
  *) echo "usage: sh scripts/install-slurm.sh [--if-possible]" >&2 && exit 2 ;;
esac

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
[ "$(missing)" ] || exit 0
[ "$(uname -s)" = Linux ] || give_up "this is $(uname -s), and SLURM's daemons run on Linux"
command -v apt-get >/dev/null || give_up "this system has no apt-get; install what brings these commands: $(missing)"
[ "$(id -u)" = 0 ] || give_up "only root can install it; run 'sudo sh scripts/install-slurm.sh', and the tests as root"

echo "installing SLURM, for the tests in tests/cluster: $packages"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# shellcheck disable=SC2086 # several packages
install() { apt-get install --yes --quiet --no-install-recommends $packages >"$log" 2>&1; }
if ! install; then # the lists of packages are old, or were never fetched
  apt-get update --quiet >/dev/null 2>&1 || :
  install || {
    tail -n 20 "$log" >&2
    give_up "apt-get could not install $packages"
  }
fi
[ -z "$(missing)" ] || give_up "the packages $packages brought no $(missing)"
