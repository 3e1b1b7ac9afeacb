# shellcheck shell=bash
# What every launcher here shares; sourced, not run.
# `--dry-run` as first argument, or DRY_RUN=1, prints each command instead of running it.
set -euo pipefail

usage() { # the comment at the head of the script is its help
  sed -n '2,/^[^#]/{/^# shellcheck/d;/^#/s/^# \{0,1\}//p}' "$0"
  exit "${1:-2}"
}

run() {
  if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

case "${1:-}" in
-h | --help) usage 0 ;;
--dry-run)
  DRY_RUN=1
  shift
  ;;
esac
