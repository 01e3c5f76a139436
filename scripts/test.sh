#!/usr/bin/env bash
# The environment with the test tools, lint, and the tests that are not marked slow; with --all every test.
# Further arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/environment.sh" requirements.txt tests/requirements.txt
ruff check .
ruff format --check .
selection=(-m "not slow")
if [ "${1:-}" = --all ]; then
    selection=()
    shift
fi
exec python -m pytest -q "${selection[@]+"${selection[@]}"}" "$@"
