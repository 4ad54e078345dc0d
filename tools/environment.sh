# Sourced by tools/check and tools/demo (bash): makes .venv with kvc8 and its tools, and enters it.
# Afterwards the working directory is the repository's root.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

find_python() {
    local name
    for name in python3.11 python3.12 python3.13 python3.14 python3; do
        # ensurepip is what a distribution leaves out when its venv package is not installed.
        if "$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
            2>/dev/null; then
            echo "$name"
            return
        fi
    done
    return 1
}

stop() {
    echo "error: $*, and run this again" >&2
    exit 1
}

make_environment() {
    # .venv/installed says what was installed, and from where: an editable install knows the
    # repository by its path. While anything is being changed it is .venv/unfinished instead, and an
    # environment left so by an interruption is made anew, for pip takes a half-copied package for
    # an installed one.
    local installed=.venv/installed unfinished=.venv/unfinished python wanted
    if [ -e $unfinished ] || { [ -e .venv ] && ! .venv/bin/python -c '' 2>/dev/null; }; then
        echo "environment: removing .venv, which is not whole"
        rm -rf .venv
    fi
    if [ ! -e .venv ]; then
        python=$(find_python) || stop "PATH: has no Python 3.11 or newer with venv; install one"
        echo "environment: making .venv with $python"
        mkdir .venv && touch $unfinished && "$python" -m venv .venv ||
            stop ".venv: cannot be made; see above"
    fi
    wanted="$(.venv/bin/python -c 'import hashlib, pathlib
print(hashlib.sha256(pathlib.Path("pyproject.toml").read_bytes()).hexdigest())') $PWD"
    if [ "$(cat $installed 2>/dev/null)" != "$wanted" ]; then
        if [ -e $installed ]; then mv $installed $unfinished; fi
        echo "environment: installing .[dev] with pip (minutes the first time)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' ||
            stop ".venv: pip cannot install .[dev]; see above"
        echo "$wanted" >$installed
        rm -f $unfinished
    fi
}

make_environment
# Where no bytecode is kept, each process compiles kvc8 and the tests anew: 5 s for those of pytest.
unset PYTHONDONTWRITEBYTECODE
# torch would load torch_npu at import wherever it is installed, and fail where CANN is not.
export TORCH_DEVICE_BACKEND_AUTOLOAD=0
export PATH="$PWD/.venv/bin:$PATH"
# Threads of OpenMP that wait sleep. Where others want the cores too, spinning ones would take four
# times the processor time: 570 s for a quantization that takes 130.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY-PASSIVE}"
# mypy cannot see through an editable install: this link shows it the folders as kvc8.*.
mkdir -p .types
ln -sfn .. .types/kvc8
echo "environment: .venv is ready ($(python --version))"
