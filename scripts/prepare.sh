#!/usr/bin/env bash
# Download a Hugging Face repository (or take a local directory in its layout) and convert it to model.pth in its folder.
#   ./scripts/prepare.sh REPO_OR_DIRECTORY [--precision float32]
# The download resumes where it was interrupted, and takes the weights in one format.
set -euo pipefail
unset CDPATH PYTHONSAFEPATH
if [ $# -eq 0 ] || [ "$1" = --help ] || [ "$1" = -h ]; then
    echo "usage: ./scripts/prepare.sh REPO_OR_DIRECTORY [--precision float32], for example JackFram/llama-68m" >&2
    [ $# -gt 0 ] || exit 2
    exit 0
fi

# Fetch the files of repository $1 whose names match the patterns behind it.
fetch() {
    local options=() pattern
    for pattern in "${@:2}"; do options+=(--include "$pattern"); done
    NO_COLOR=1 HF_HUB_DISABLE_UPDATE_CHECK=1 HF_HUB_DISABLE_PROGRESS_BARS=0 \
        python -m huggingface_hub.cli.hf download "$1" --quiet --local-dir "checkpoints/$1" "${options[@]}" > /dev/null
}

# Say why repository $1 was not downloaded, and what to do, in one line.
give_up() {
    echo "$1 was not downloaded (${2#Error: }): check the name (of a repository, or of a directory that exists) and the" \
        "network, then again: it resumes; a gated repository wants its licence accepted on its page and \`hf auth login\`" >&2
    exit 1
}

# Small files first: they say whether the repository can be had and converted.
download() {
    local said name folder=checkpoints/$1
    said=$(fetch "$1" config.json tokenizer.model tokenizer_config.json chat_template.jinja '*.index.json' 2>&1) ||
        give_up "$1" "$(tail -n 1 <<< "$said")"
    for name in config.json tokenizer.model; do
        [ -f "$folder/$name" ] || give_up "$1" "it has no $name: only Llama models with a sentencepiece tokenizer will do"
    done
    for name in 'model[.-]*safetensors' 'pytorch_model[.-]*bin'; do
        fetch "$1" "$name" || give_up "$1" "see the line above"
        if compgen -G "$folder/$name" > /dev/null; then return; fi
    done
    give_up "$1" "it has no weights in safetensors or .bin"
}

here=$(cd "$(dirname "$0")/.." && pwd)
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
