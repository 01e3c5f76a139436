"""Download what the converter needs of a Hugging Face repository to checkpoints/REPO; an interrupted download resumes."""

import signal

if __name__ == "__main__":  # before the imports, which take a while
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

TEXTS = ["config.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"]
WEIGHTS = [  # one format is enough: the first that the repository has
    ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"],
]


def download(repo: str) -> Path:
    """The folder that holds the repository's config, tokenizer and weights in one format. ValueError names the cure."""
    folder = Path("checkpoints") / repo
    try:
        names = [file.rfilename for file in HfApi().repo_info(repo).siblings]
        if "config.json" not in names:
            raise ValueError(f"{repo} has no config.json: it is not in Hugging Face layout")
        if "tokenizer.model" not in names:
            raise ValueError(f"{repo} has no tokenizer.model: only models with a sentencepiece tokenizer are supported")
        wanted = [weights for weights in WEIGHTS if weights[0] in names or weights[2] in names]
        if not wanted:
            raise ValueError(f"{repo} has neither {WEIGHTS[0][0]} nor {WEIGHTS[1][0]}: its weights are in another format")
        snapshot_download(repo, local_dir=folder, allow_patterns=TEXTS + wanted[0])
    except GatedRepoError as error:
        raise ValueError(f"{repo} is gated: accept its licence on its page, then log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{repo}: no such repository, or a private one (then log in with `hf auth login`)") from error
    except HFValidationError as error:
        raise ValueError(f"{repo}: neither a local directory nor a repository's name such as JackFram/llama-68m") from error
    except (ValueError, PermissionError):
        raise
    except Exception as error:  # the hub's client lets its HTTP library's own errors through, another one each year
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{repo}: download failed ({reason}); check the network and run it again: it resumes") from error
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Download a Hugging Face Llama repository to checkpoints/REPO.")
    parser.add_argument("repo", help="for example JackFram/llama-68m")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        print(f"downloaded to {download(parser.parse_args().repo)}", file=sys.stderr)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
