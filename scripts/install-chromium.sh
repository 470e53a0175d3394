#!/bin/sh
# Installs Chromium for the tests that open a page in a browser, from Debian's packages: as root, on Debian and its like.
#
#   sh scripts/install-chromium.sh                  fails where it cannot be installed
#   sh scripts/install-chromium.sh --if-possible    says so and goes on, as those tests are then skipped with the reason
#
# What is installed already is left as it is; DISTRAIN_CHROMIUM names a browser that is installed elsewhere.
set -eu

commands="chromium-headless-shell chromium chromium-browser google-chrome google-chrome-stable"
packages="chromium-headless-shell fonts-dejavu-core"

installed() {
  [ -z "${DISTRAIN_CHROMIUM:-}" ] || return 0
  for command in $commands; do
    # one that starts: on Ubuntu `chromium-browser` may be a script that asks for a snap
    if command -v "$command" >/dev/null 2>&1 && "$command" --version >/dev/null 2>&1; then return 0; fi
  done
  return 1
}

give_up() {
  echo "Chromium is not installed: $1" >&2
  if [ "$optional" ] && [ "${CI:-}" != true ]; then
    echo "the tests that open a page in a browser will be skipped" >&2
    exit 0
  fi
  exit 1
}

optional=
case "${1:-}" in
  --if-possible) optional=yes ;;
  '') ;;
  *) echo "usage: sh scripts/install-chromium.sh [--if-possible]" >&2 && exit 2 ;;
esac

if installed; then exit 0; fi
[ "$(uname -s)" = Linux ] || give_up "this is $(uname -s); install one of these commands: $commands"
command -v apt-get >/dev/null || give_up "this system has no apt-get; install one of these commands: $commands"
[ "$(id -u)" = 0 ] || give_up "only root can install it; run 'sudo sh scripts/install-chromium.sh'"

echo "installing Chromium, for the tests that open a page in a browser: $packages"
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
installed || give_up "the packages $packages brought no browser that starts"
