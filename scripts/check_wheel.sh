#!/bin/sh
# Build the wheel and test it as a user would install it: scripts/check_wheel.sh
#
# Installs the wheel, and on Linux the extra `cpu`, into a bare venv of the lowest and of the newest
# Python found here (or of PYTHON=...): no development tools, no imports from this checkout. Checks
# that the command and the package answer with the embedded demo model, that every module imports,
# and that without MLX's backend one line says what is missing. Prints "N passed, N failed".

set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' HUP INT TERM
unset QWEN3_MODEL PYTHONPATH
cd "$work"

have_uv() { uv --version >/dev/null 2>&1; }

on_linux() { [ "$(uname -s)" = Linux ]; }

import_all='
import importlib, pkgutil, qwen3_mlx
for module in pkgutil.walk_packages(qwen3_mlx.__path__, "qwen3_mlx."):
    if module.name != "qwen3_mlx.__main__" and not module.name.startswith("qwen3_mlx.server"):
        importlib.import_module(module.name)
'
chat='
import sys, qwen3_mlx
assert qwen3_mlx.__file__.startswith(sys.prefix), qwen3_mlx.__file__
with qwen3_mlx.load() as llm:
    print(llm.chat("What is 12 + 34?", seed=1, max_tokens=200).text)
'

# expect_in WANTED TEXT: fail and print TEXT unless it contains WANTED.
expect_in() {
    case $2 in *"$1"*) return 0 ;; esac
    printf 'expected "%s" in this output:\n%s\n' "$1" "$2"
    return 1
}

make_venv() { # INTERPRETER FOLDER
    if have_uv; then
        uv venv --quiet --python "$1" "$2"
    else
        "$1" -m venv "$2"
    fi
}

pip() { # COMMAND VENV ARGUMENTS...
    command=$1 venv=$2
    shift 2
    if have_uv; then
        uv pip "$command" --quiet --python "$venv/bin/python" "$@"
    else
        "$venv/bin/python" -m pip "$command" --quiet --disable-pip-version-check "$@"
    fi
}

build() { # INTERPRETER
    if have_uv; then
        uv build --quiet --python "$1" --wheel --out-dir "$work" "$root"
    else
        make_venv "$1" builder
        builder/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps \
            --wheel-dir "$work" "$root"
    fi
}

check() { # INTERPRETER
    make_venv "$1" venv &&
        pip install venv "$(echo "$work"/*.whl)$(on_linux && echo '[cpu]' || :)" &&
        expect_in 46 "$(venv/bin/qwen3 --seed 1 "What is 12 + 34?" </dev/null 2>&1)" &&
        expect_in 46 "$(venv/bin/python -c "$chat" 2>&1)" &&
        venv/bin/python -c "$import_all" || return
    ! on_linux || check_without_backend
}

check_without_backend() {
    pip uninstall venv $(have_uv || echo --yes) mlx-cpu || return
    answer=$(venv/bin/qwen3 Hello </dev/null 2>&1) || :
    expect_in "pip install 'mlx[cpu]'" "$answer" || return
    [ "$(echo "$answer" | wc -l)" -eq 1 ] || { echo "more than one line: $answer" && return 1; }
}

passed=0 failed=0
finish() {
    echo "$passed passed, $failed failed"
    exit "$failed"
}

pythons=$("$root/scripts/venv.sh" pythons)
[ -n "$pythons" ] || { echo "no Python 3.11 or later was found" && failed=1 && finish; }
lowest=$(echo "$pythons" | head -n 1)
newest=$(echo "$pythons" | tail -n 1)
build "${newest#* }" || { echo "the wheel cannot be built" && failed=1 && finish; }
for python in "$lowest" "$newest"; do
    [ "$python" != "$lowest" ] || [ "$passed$failed" = 00 ] || break # the newest is the lowest
    echo "$(echo *.whl) on Python ${python%% *} ..."
    if check "${python#* }"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
    fi
    rm -rf venv
done
finish
