"""Download what the converter needs of a Hugging Face repository to checkpoints/REPO; an interrupted download resumes."""

import argparse
import fnmatch
import sys
from pathlib import Path

from quantize import run
from scripts.convert_hf_checkpoint import WEIGHTS

from huggingface_hub import HfApi, snapshot_download

TEXTS = ["config.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"]
CURE = """check the name (of a repository, or of a directory that exists) and the network, then again: it resumes; a gated
repository wants its licence accepted on its page and `hf auth login`"""


def download(repo: str) -> Path:
    """The folder that holds the repository's config, tokenizer and weights in one format. ValueError names the cure."""
    folder = Path("checkpoints") / repo
    try:
        names = [file.rfilename for file in HfApi().repo_info(repo).siblings]
        wanted = [pattern for pattern in WEIGHTS if fnmatch.filter(names, pattern)]
        if not wanted or not {"config.json", "tokenizer.model"} <= set(names):
            raise ValueError("it lacks config.json, a sentencepiece tokenizer.model, or weights in safetensors or .bin")
        snapshot_download(repo, local_dir=folder, allow_patterns=[*TEXTS, wanted[0]])
    except Exception as error:  # the hub's client lets its HTTP library's own errors through, another one each year
        raise ValueError(f"{repo} was not downloaded ({' '.join(str(error).split())[:300]}): {CURE}") from error
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Download a Hugging Face Llama repository to checkpoints/REPO.")
    parser.add_argument("repo", help="for example JackFram/llama-68m")
    print(f"downloaded to {download(parser.parse_args().repo)}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
