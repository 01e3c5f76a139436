#!/usr/bin/env bash
# Download a Hugging Face repository (or take a local directory in its layout) and convert it to model.pth in it.
#   ./scripts/prepare.sh REPO_OR_DIRECTORY [--precision float32]
# Whole files are not downloaded again, and weights are downloaded in one format.
set -euo pipefail
unset CDPATH
if [ $# -eq 0 ] || [ "$1" = --help ] || [ "$1" = -h ]; then
    echo "usage: ./scripts/prepare.sh REPO_OR_DIRECTORY [--precision float32], for example JackFram/llama-68m" >&2
    [ $# -gt 0 ] || exit 2
    exit 0
fi

# `hf download` of repository $1 to its folder, with further options. What it would answer by a traceback is one line.
hf_download() {
    NO_COLOR=1 HF_HUB_DISABLE_UPDATE_CHECK=1 python -c '
import sys
try:
    from huggingface_hub.cli.hf import main
    main()
except Exception as error:
    sys.exit(f"Error: {error!r}")' download --quiet --local-dir "checkpoints/$1" "${@:2}" -- "$1"
}

# Say why repository $1 was not downloaded, which is the error in $2, and what to do, in one line.
give_up() {
    local cause
    cause=$(grep -m 1 '^Error: ' <<< "$2") || cause=${2##*$'\n'}
    echo "$1 was not downloaded (${cause#Error: }): check the name (of a repository, or of a directory that exists)" \
        "and the network, then again: whole files are kept; a gated repository wants its licence accepted on its" \
        "page and \`hf auth login\`" >&2
    exit 1
}

# Link the files of repository $1 that lie in the hub's own cache. Fails if there are none.
take_from_cache() {
    local cached
    cached=$(python -c '
import sys
from huggingface_hub import snapshot_download
print(snapshot_download(sys.argv[1], local_files_only=True))' "$1" 2> /dev/null) || return 1
    mkdir -p "checkpoints/$1"
    cp -rsf "$(readlink -f "$cached")/." "checkpoints/$1"
    echo "the hub cannot be reached: taking $1 from its cache, $cached" >&2
}

# Say that repository $1 has no $2, without which it cannot be converted.
refuse() {
    echo "$1 has no $2: only Llama models in Hugging Face's layout will do" >&2
    exit 1
}

# Small files first: they say whether the repository can be had and converted. The weights in the first format it has.
download() {
    local said name
    local small=(config.json generation_config.json tokenizer.model tokenizer.json tokenizer_config.json
        added_tokens.json special_tokens_map.json chat_template.jinja model.safetensors.index.json pytorch_model.bin.index.json)
    said=$(hf_download "$1" "${small[@]/#/--include=}" 2>&1) || { take_from_cache "$1" && return; } || give_up "$1" "$said"
    [ -f "checkpoints/$1/config.json" ] || refuse "$1" config.json
    [ -f "checkpoints/$1/tokenizer.model" ] || [ -f "checkpoints/$1/tokenizer.json" ] ||
        refuse "$1" "tokenizer.model or tokenizer.json"
    for name in 'model[.-]*safetensors' 'pytorch_model[.-]*bin'; do
        said=$(hf_download "$1" --dry-run --include "$name" 2>&1) || give_up "$1" "$said"
        if [[ $'\n'$said == *$'\n'$name* ]]; then  # it lists them
            HF_HUB_DISABLE_PROGRESS_BARS=0 hf_download "$1" --include "$name" > /dev/null ||
                give_up "$1" "see the line above"
            return
        fi
    done
    refuse "$1" "weights in safetensors or .bin"
}

here=$(cd "$(dirname "$(readlink -f "$0")")/.." && pwd)
if [ -d "$1" ]; then
    folder=$(cd "$1" && pwd)
    cd "$here"
else
    folder=checkpoints/$1
    cd "$here"
    download "$1"
fi
shift
exec python -m scripts.convert_hf_checkpoint --checkpoint_dir "$folder" "$@"
