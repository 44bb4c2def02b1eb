# shellcheck shell=bash
# Helpers that the scripts in deploy/ share. Source it; it does nothing by itself.

# Seconds since the script began count from here (bash counts SECONDS itself).
SECONDS=0

# step TEXT: a progress line with the seconds elapsed.
step() { printf '[%4d s] %s\n' "$SECONDS" "$*"; }

# die TEXT [HINT]: what failed and, indented below it, what to do; ends the script.
die() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    if [ $# -gt 1 ]; then printf '%s\n' "$2" | sed 's/^/    /' >&2; fi
    exit 1
}

# need COMMAND HINT: ends the script with the hint if the command is missing.
need() { command -v "$1" >/dev/null 2>&1 || die "the command '$1' is missing" "$2"; }

# usage: prints the calling script's header comment, which is its --help text.
usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

# size PATH: a file's or folder's size on disk, for people.
size() { du -sh -- "$1" | cut -f1; }

# need_disk FOLDER GIGABYTES: ends the script if less is free where FOLDER lies.
need_disk() {
    local free_kib
    free_kib=$(df -Pk -- "$1" | awk 'NR == 2 { print $4 }')
    if [ "$free_kib" -lt $(($2 * 1024 * 1024)) ]; then
        die "only $((free_kib / 1024)) MiB free under $1, but $2 GB are needed" \
            "Free some space, or move the checkout to a larger disk."
    fi
}

# need_pip: python3 with pip, which fetches packages here and installs none.
need_pip() {
    need python3 "Install Python 3 (on Debian and Ubuntu: apt-get install python3 python3-pip)."
    python3 -m pip --version >/dev/null 2>&1 || die "python3 has no pip" \
        "Install it (on Debian and Ubuntu: apt-get install python3-pip; elsewhere: python3 -m ensurepip --user)."
}

# pip_download FOLDER ARGUMENTS...: 'pip download' without dependencies. pip's own
# output is kept for a failure and shown live only on a terminal.
pip_download() {
    local folder=$1 log
    shift
    mkdir -p "$folder"
    log=$(mktemp)
    if [ -t 1 ]; then
        python3 -m pip download --disable-pip-version-check --no-deps -d "$folder" "$@" 2>"$log" && rm "$log" && return
    else
        python3 -m pip download --disable-pip-version-check --no-deps -d "$folder" "$@" >"$log" 2>&1 && rm "$log" && return
    fi
    tail -n 5 "$log" >&2
    rm "$log"
    die "the Python package index gave no answer, or not the package (pip's words are above)" \
        "Check the network and any proxy (HTTPS_PROXY), or name a mirror in PIP_INDEX_URL; then run this again: what has arrived is kept."
}
