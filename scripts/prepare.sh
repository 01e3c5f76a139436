#!/usr/bin/env bash
# Download a Hugging Face repository (or take a local directory in its layout) and convert it to model.pth in its folder.
#   ./scripts/prepare.sh REPO_OR_DIRECTORY [--precision float32]
set -euo pipefail
if [ $# -eq 0 ] || [ "$1" = --help ] || [ "$1" = -h ]; then
    echo "usage: ./scripts/prepare.sh REPO_OR_DIRECTORY [--precision float32], for example JackFram/llama-68m" >&2
    [ $# -gt 0 ] || exit 2
    exit 0
fi
here=$(cd "$(dirname "$0")/.." && pwd)
if [ -d "$1" ]; then
    folder=$(cd "$1" && pwd)
    cd "$here"
else
    folder=checkpoints/$1
    cd "$here"
    python -m scripts.download "$1"
fi
shift
exec python -m scripts.convert_hf_checkpoint --checkpoint_dir "$folder" "$@"
