#!/usr/bin/env bash
# Builds sdist and wheel, installs the wheel into empty environments, base and [tune], and uses it as a user would.
# Usage: .ci/install_wheel.sh [FOLDER]; needs uv or pip, and a network or a cache of packages. Prints seconds per step.
set -euo pipefail
cd "$(dirname "$0")/.."
WORK=$(realpath -m "${1:-$(mktemp -d)}")
mkdir -p "$WORK"
step() {
    local name=$1 began=$SECONDS
    shift
    "$@" >"$WORK/log" 2>&1 || { cat "$WORK/log"; echo "failed: $name" >&2; exit 1; }
    printf '%-34s %4d s\n' "$name" $((SECONDS - began))
}
environment() { uv venv -q --python "${PYTHON:-3.11}" "$WORK/$1" && uv pip install -q --python "$WORK/$1/bin/python" "$2"; }

step "build" uvx --from build pyproject-build --installer uv --outdir "$WORK/dist" .
step "twine check" uvx twine check --strict "$WORK"/dist/*
WHEEL=$(echo "$WORK"/dist/*.whl)
step "install base" environment base "$WHEEL"
cd "$WORK"
step "import stagevar" base/bin/python -c 'import stagevar; print(stagevar.__version__)'
step "stagevar --help" base/bin/stagevar --help
step "stagevar generate" base/bin/stagevar generate --model nano "a photo of a red circle" -o red.png
code=0; base/bin/stagevar-tune --model nano --budget 60% 2>"$WORK/said" || code=$?
[ "$code" = 2 ] && grep -q "stagevar-tune\[tune\]" "$WORK/said" || { echo "base: $code $(cat "$WORK/said")" >&2; exit 1; }
step "install [tune]" environment tune "$WHEEL[tune]"
step "stagevar-tune --dry-run" tune/bin/stagevar-tune --model nano --budget 60% --dry-run
step "uvx --from wheel stagevar" uvx --from "$WHEEL" stagevar generate --model nano "a photo of a blue star" -o blue.png
if [ "${STUDY:-}" ]; then
    step "stagevar-tune, six schedules" tune/bin/stagevar-tune --model nano --budget 60% --trials 6 --out run
fi
test -s red.png && test -s blue.png
echo "wheel works: $WHEEL"
