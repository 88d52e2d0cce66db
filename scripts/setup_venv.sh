# Sourced by scripts/metarl, scripts/test and .ci/run. Sets `root` to the repository and sees to it that $root/.venv
# holds the versions of requirements.lock and the project itself, editable; if it does already, in a few milliseconds.

root=$(cd -P "${BASH_SOURCE[0]%/*}/.." && pwd)

# What a finished set-up leaves in .venv/stamp. The place is part of it because an environment that was copied or moved
# would go on running the code of the place it came from.
stamp=$root$'\n'$(cd "$root" && cksum pyproject.toml requirements.lock)

is_set_up() { [[ -f $root/.venv/stamp && $(<"$root/.venv/stamp") == "$stamp" ]]; }

# A name on PATH proves little (version managers put a stand-in there for each version they know of), so it is run.
is_python_in_range() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

make_venv() {
    if command -v uv >/dev/null; then
        uv venv --quiet --clear --seed --python '>=3.11,<3.14' "$root/.venv"
        return
    fi
    local python
    for python in python3.13 python3.12 python3.11 python3; do
        # Some systems ship Python without ensurepip, the source of an environment's pip.
        if is_python_in_range "$python" && "$python" -c 'import ensurepip' 2>/dev/null; then
            "$python" -m venv --clear --without-pip "$root/.venv"
            return
        fi
    done
    echo "metarl needs Python 3.11, 3.12 or 3.13 with the modules venv and ensurepip, and there is none on PATH." \
        "Install one, or uv, which brings its own." >&2
    return 1
}

set_up() {
    local python=$root/.venv/bin/python before='' install
    echo "metarl: installing into $root/.venv; this takes a minute or two" >&2

    # An environment from another place, or one whose set-up was cut off and may have left half a package behind, is
    # made anew. Any other is brought up to date in place and keeps what its owner has added to it.
    if [[ -f $root/.venv/stamp ]]; then before=$(head -n 1 "$root/.venv/stamp"); fi
    if [[ -n $before && $before != "$root" ]] || ! is_python_in_range "$python"; then make_venv; fi
    echo unfinished >"$root/.venv/stamp"

    if command -v uv >/dev/null; then
        install=(uv pip install --quiet --python "$python" --compile-bytecode)
    else
        "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip --default-pip >/dev/null
        install=("$python" -m pip install -qq --disable-pip-version-check) # -q lets warnings pass
    fi
    # The lock is complete, the build backend included: nothing is left to resolve or to build in isolation.
    "${install[@]}" --no-deps -r "$root/requirements.lock"
    "${install[@]}" --no-deps --no-build-isolation -e "$root"

    echo "$stamp" >"$root/.venv/stamp"
}

# One set-up at a time: who comes second waits, and then finds the work done. To be called where `set -e` is in force
# (not in a condition, not before `||`), so that a failed step ends it, and in a subshell, so that the lock ends with it.
set_up_alone() {
    lock=$root/.venv.lock
    if command -v flock >/dev/null; then
        exec 9>"$lock"
        flock 9
    else
        until mkdir "$lock" 2>/dev/null; do
            if [[ ! -d $lock ]]; then mkdir "$lock"; fi # not taken, but impossible: fail, and say why
            echo "metarl: waiting for another set-up; if there is none, remove $lock" >&2
            sleep 5
        done
        trap 'rmdir "$lock"' EXIT
    fi
    if ! is_set_up; then set_up; fi
}

if ! is_set_up; then (set_up_alone) >&2; fi
