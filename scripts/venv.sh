#!/bin/sh
# Create .venv and install this project into it: scripts/venv.sh runtime|server|dev
# List the usable interpreters, "VERSION PATH", lowest version first: scripts/venv.sh pythons
#
# .venv/.ready records the folder, pyproject.toml and kind of use of the installation; while they
# match, nothing is done. .venv/.unfinished exists while the script works: a .venv that still has it
# was interrupted and is created again. PYTHON=... names the interpreter; the default is the newest
# one from 3.11 up. uv does the work if it is installed, otherwise venv and pip do.

set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
trap 'exit 130' HUP INT TERM

# Prints the verdict on an interpreter (fit, bare: no venv module, rosetta, old), version and path.
probe='
import platform, sys
verdict = "fit"
if sys.version_info < (3, 11):
    verdict = "old"
elif sys.platform == "darwin" and platform.machine() != "arm64":
    verdict = "rosetta"
else:
    try:
        import ensurepip, venv
    except ImportError:
        verdict = "bare"
path = getattr(sys, "_base_executable", None) or sys.executable  # outside of any venv
print(" ".join([verdict, platform.python_version(), path]))
'

say() { printf '%s\n' "$*"; }

refuse() {
    printf '%s\n' "$*" >&2
    exit 1
}

have_uv() { uv --version >/dev/null 2>&1; }

run_probe() { "$1" -c "$probe" </dev/null 2>/dev/null; }

on_mac() { [ "$(uname -s)" = Darwin ]; }

# MLX has builds for Apple silicon with macOS 14 or later, and for Linux.
check_machine() {
    if on_mac; then
        # Under Rosetta, uname says x86_64 on Apple silicon as well; sysctl says what it is.
        [ "$(uname -m)" = arm64 ] ||
            [ "$(PATH=$PATH:/usr/sbin sysctl -n hw.optional.arm64 2>/dev/null)" = 1 ] ||
            refuse "This Mac has an Intel processor; MLX needs Apple silicon (M1 or later)."
        macos=$(sw_vers -productVersion)
        [ "${macos%%.*}" -ge 14 ] ||
            refuse "This Mac runs macOS $macos; MLX needs macOS 14 or later."
    elif [ "$(uname -s)" != Linux ]; then
        refuse "MLX runs on macOS and Linux, not on $(uname -s)."
    fi
}

candidates() {
    if [ -n "${PYTHON:-}" ]; then
        say "$PYTHON"
        return
    fi
    for minor in 14 13 12 11; do
        command -v "python3.$minor" || :
        for pyenv in "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/3.$minor".*/bin/python; do
            [ ! -x "$pyenv" ] || say "$pyenv"
        done
    done
    command -v python3 || :
    command -v python || :
}

# Set verdict, version and path to those of the first fit candidate (bare is enough for uv), or else
# to those of the first candidate.
find_python() {
    verdict=none version='' path=''
    while IFS= read -r candidate; do
        answer=$(run_probe "$candidate") || continue
        read -r found_verdict found_version found_path <<ANSWER
$answer
ANSWER
        if [ "$verdict" = none ] || [ "$found_verdict" = fit ]; then
            verdict=$found_verdict version=$found_version path=$found_path
        fi
        if [ "$verdict" = bare ] && have_uv; then verdict=fit; fi
        if [ "$verdict" = fit ]; then return; fi
    done <<CANDIDATES
$(candidates)
CANDIDATES
}

refuse_python() {
    if on_mac; then
        way="brew install python@3.12, or install uv"
    else
        way="sudo apt install python3 python3-venv, or install uv"
    fi
    found="$path ($version)"
    case $verdict in
    bare) refuse "$found lacks its venv module: sudo apt install python${version%.*}-venv" ;;
    rosetta) refuse "$found is an Intel Python, run under Rosetta, and MLX needs a native one:" \
        "$way (in a terminal under Rosetta: arch -arm64 make)" ;;
    old) refuse "Python 3.11 or later is needed, and $path is $version: $way" ;;
    none) refuse "${PYTHON:-Python 3.11 or later} was not found: $way" ;;
    esac
}

# Print one line per minor version: its first fit candidate (bare is enough for uv).
list_pythons() {
    candidates | while IFS= read -r candidate; do
        answer=$(run_probe "$candidate") || continue
        case $answer in
        fit*) say "${answer#* }" ;;
        bare*) ! have_uv || say "${answer#* }" ;;
        esac
    done | sort -t . -k 2,2n -u
}

# Succeed if the existing .venv can be used: finished, of a fit Python (of PYTHON, if that is set),
# and with an installer. It need not have been created by this script.
usable() {
    [ ! -e .venv/.unfinished ] && answer=$(run_probe .venv/bin/python) || return 1
    case $answer in old* | rosetta*) return 1 ;; esac
    if [ -n "${PYTHON:-}" ]; then
        wanted=$(run_probe "$PYTHON") || return 1
        [ "$(say "$answer" | cut -d ' ' -f 2)" = "$(say "$wanted" | cut -d ' ' -f 2)" ] || return 1
    fi
    have_uv || .venv/bin/python -m pip --version >/dev/null 2>&1
}

make_venv() {
    find_python
    if [ "$verdict" != fit ] && { [ -n "${PYTHON:-}" ] || ! have_uv; }; then refuse_python; fi
    rm -rf .venv
    mkdir .venv
    : >.venv/.unfinished
    if ! have_uv; then
        say "Creating .venv with $path ($version) ..."
        "$path" -m venv .venv || refuse "Creating .venv failed; is $path a complete Python?"
    elif [ "$verdict" = fit ]; then
        say "Creating .venv with uv and $path ($version) ..."
        uv venv --quiet --allow-existing --python "$path" .venv
    else
        say "Creating .venv with uv and a Python of its own ..."
        # Not the newest of all: 3.15 still lacks some wheels.
        uv venv --quiet --allow-existing --python-preference only-managed \
            --python '>=3.11,<3.15' .venv || refuse_python
        answer=$(run_probe .venv/bin/python) || answer='does not run'
        case $answer in
        fit* | bare*) ;;
        *) refuse "uv's Python does not fit ($answer); name one that does: make PYTHON=..." ;;
        esac
    fi
}

# Print a line every ten seconds while this script runs: the installers are quiet.
show_progress() {
    seconds=0
    while sleep 10 >/dev/null 2>&1 && kill -0 "$$" 2>/dev/null; do
        seconds=$((seconds + 10))
        say "  still installing, $seconds s ..."
    done
}

install() {
    if have_uv; then
        uv pip install --quiet --python .venv/bin/python --editable "$1"
    else
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable "$1"
    fi
}

case ${1:-} in
runtime) extras='' tools="" ;;
server) extras=server tools=" with the server" ;;
dev) extras=dev tools=" with the development tools" ;;
pythons)
    list_pythons
    exit
    ;;
*) refuse "usage: scripts/venv.sh runtime|server|dev|pythons" ;;
esac
on_mac || extras="${extras:+$extras,}cpu" # MLX's backend on Linux
target=.${extras:+[$extras]}
state="$(pwd -P) $(cksum <pyproject.toml)"
ready=$(cat .venv/.ready 2>/dev/null) || ready=''
case "$1 $ready" in
"runtime $state "* | "server $state server" | "$1 $state dev" | "dev $state dev")
    if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then exit 0; fi
    if usable; then exit 0; fi
    ;;
esac

check_machine
if ! usable; then make_venv; fi
: >.venv/.unfinished
rm -f .venv/.ready
say "Installing qwen3-mlx into .venv$tools (a minute or two) ..."
show_progress &
progress=$!
# KILL, because TERM is lost between the fork and the reset of the traps above.
trap 'kill -KILL "$progress" 2>/dev/null || :' EXIT
if ! install "$target"; then
    rm .venv/.unfinished # failed, but not interrupted: the next run resumes with this .venv
    refuse "The installation failed; see the errors above."
fi
say "$state $1" >.venv/.ready
rm .venv/.unfinished
