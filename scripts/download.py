"""Download what the converter needs of a Hugging Face repository to checkpoints/REPO; an interrupted download resumes."""

import launch  # isort: skip  # noqa: F401

import argparse
import sys
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from quantize import run

TEXTS = ["config.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"]
WEIGHTS = [  # one format is enough: the first that the repository has
    ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"],
]
CURES = {  # of what the hub's client raises, the first that fits
    GatedRepoError: "gated: accept its licence on its page, then log in with `hf auth login`",
    RepositoryNotFoundError: "no such repository, or a private one (then log in with `hf auth login`)",
    HFValidationError: "neither a local directory nor a repository's name such as JackFram/llama-68m",
}


def download(repo: str) -> Path:
    """The folder that holds the repository's config, tokenizer and weights in one format. ValueError names the cure."""
    folder = Path("checkpoints") / repo
    try:
        names = [file.rfilename for file in HfApi().repo_info(repo).siblings]
        wanted = [weights for weights in WEIGHTS if weights[0] in names or weights[2] in names]
        if not wanted or not {"config.json", "tokenizer.model"} <= set(names):
            raise ValueError("it lacks config.json, a sentencepiece tokenizer.model, or weights in safetensors or .bin")
        snapshot_download(repo, local_dir=folder, allow_patterns=TEXTS + wanted[0])
    except PermissionError:
        raise
    except Exception as error:  # the hub's client lets its HTTP library's own errors through, another one each year
        reason = " ".join(str(error).split())[:200]
        failed = (
            reason if type(error) is ValueError else f"download failed ({reason}); check the network, then again: it resumes"
        )
        raise ValueError(f"{repo}: {next((CURES[kind] for kind in CURES if isinstance(error, kind)), failed)}") from error
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Download a Hugging Face Llama repository to checkpoints/REPO.")
    parser.add_argument("repo", help="for example JackFram/llama-68m")
    print(f"downloaded to {download(parser.parse_args().repo)}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
