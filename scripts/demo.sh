#!/usr/bin/env bash
# From a fresh clone to streamed text, without a download: the environment, the bundled checkpoint, generate.py.
# Further arguments go to generate.py.
set -euo pipefail
. "$(dirname "$(readlink -f "$0")")/environment.sh" requirements.txt
model=checkpoints/demo/target/model.pth
if [ ! -f "$model" ]; then
    mkdir -p checkpoints/demo
    cp -r tests/demo/target tests/demo/draft checkpoints/demo/
    ./scripts/prepare.sh checkpoints/demo/draft
    ./scripts/prepare.sh checkpoints/demo/target
fi
exec python generate.py --compile --checkpoint_path "$model" --prompt "def read_file(" "$@"
