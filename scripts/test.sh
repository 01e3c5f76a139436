#!/usr/bin/env bash
# The environment with the test tools, lint, all tests. Arguments go to pytest; without any, everything runs.
set -euo pipefail
. "$(dirname "$0")/environment.sh" requirements.txt tests/requirements.txt
ruff check .
ruff format --check .
exec python -m pytest -q "$@"
