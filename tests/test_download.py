"""What is fetched of a repository, and what is said where it cannot be: against a fake hub in a folder."""

import errno
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

import quantize
from scripts import download

REPO = "someone/llama"
TEXTS = {"config.json", "tokenizer.model", "tokenizer_config.json"}
UNUSED = {
    "README.md", "tokenizer.json", "consolidated.00.pth", "original/params.json", "onnx/model.onnx", "modeling.py",
    "model.safetensors.index.json", "pytorch_model.bin.index.json", "training_args.bin", "original/model.safetensors",
}  # fmt: skip
SAFETENSORS = {"model.safetensors"}
SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
BIN = {"pytorch_model.bin"}
BIN_SHARDS = {"pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"}


class Hub:
    """One repository; `fails`: what asking for it, or fetching the file of that name, raises."""

    def __init__(self) -> None:
        self.files = TEXTS | SAFETENSORS
        self.fails: dict[str, BaseException] = {}
        self.fetched: list[str] = []

    def repo_info(self, repo: str) -> SimpleNamespace:
        if "repo_info" in self.fails:
            raise self.fails["repo_info"]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in sorted(self.files)])

    def snapshot_download(self, repo: str, local_dir: Path, allow_patterns: list[str]) -> str:
        for name in sorted(self.files):
            target = Path(local_dir, name)
            if not any(fnmatch(name, pattern) for pattern in allow_patterns) or target.exists():
                continue
            if name in self.fails:
                raise self.fails[name]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(f"{repo}/{name}")
            self.fetched.append(name)
        return str(local_dir)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The fake hub, in the place of the real one; the working directory is an empty folder."""
    hub = Hub()
    monkeypatch.setattr(download, "HfApi", lambda: hub)
    monkeypatch.setattr(download, "snapshot_download", hub.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return hub


@pytest.fixture
def status(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """A function: runs the command line as a script does and returns its exit status."""

    def run() -> int:
        monkeypatch.setattr(sys, "argv", ["download.py", REPO])
        try:
            quantize.run(download.main)
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
                return 1
            return end.code or 0
        return 0

    return run


def http(kind: type[HfHubHTTPError], message: str) -> HfHubHTTPError:
    return kind(message, response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    "files, weights",
    [
        (SAFETENSORS, SAFETENSORS),
        (SHARDS, SHARDS),
        (BIN, BIN),
        (BIN_SHARDS, BIN_SHARDS),
        (SAFETENSORS | BIN, SAFETENSORS),
        (SHARDS | BIN_SHARDS, SHARDS),
        (SHARDS | BIN, SHARDS),
    ],
)
def test_one_format_of_weights_is_fetched_and_nothing_that_is_not_read(
    hub: Hub, files: set[str], weights: set[str]
) -> None:
    """Texts and weights, safetensors where there are both, to checkpoints/REPO."""
    hub.files = TEXTS | UNUSED | files
    assert download.download(REPO) == Path("checkpoints") / REPO
    assert set(hub.fetched) == TEXTS | weights
    assert {str(path.relative_to(Path("checkpoints") / REPO)) for path in Path().rglob("*.*")} == TEXTS | weights


def test_the_chat_template_is_fetched(hub: Hub) -> None:
    """The converter looks into it."""
    hub.files |= {"chat_template.jinja"}
    download.download(REPO)
    assert "chat_template.jinja" in hub.fetched


def test_what_is_found_is_said_on_stderr(hub: Hub, status: Callable, capsys: pytest.CaptureFixture) -> None:
    """Status 0, one line that says where; stdout stays empty."""
    assert status() == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"downloaded to checkpoints/{REPO}\n"


@pytest.mark.parametrize(
    "missing, says",
    [
        ({"tokenizer.model"}, ["lacks", "sentencepiece tokenizer.model"]),
        (SAFETENSORS, ["lacks", "weights in safetensors or .bin"]),
        ({"config.json"}, ["lacks", "config.json"]),
    ],
)
def test_a_repository_that_cannot_be_converted_is_refused_before_the_download(
    hub: Hub, missing: set[str], says: list[str], status: Callable, capsys: pytest.CaptureFixture
) -> None:
    """One line that names the file, status 1, and gigabytes are not fetched in vain."""
    hub.files -= missing
    assert status() == 1
    assert_one_line(capsys, [REPO, *says])
    assert hub.fetched == []


GATED = http(
    GatedRepoError, "403 Client Error.\n\nCannot access gated repo for url https://huggingface.co/api.\nAsk for access."
)
FAILURES = {
    "gated": ("repo_info", GATED, ["gated", "licence", "hf auth login"]),
    "gated, its list of files is not": ("model.safetensors", GATED, ["gated", "licence", "hf auth login"]),
    "unknown": (
        "repo_info",
        http(RepositoryNotFoundError, "401 Client Error.\n\nNot Found."),
        ["Not Found", "check the name", "hf auth login"],
    ),
    "no name of a repository": (
        "repo_info",
        HFValidationError("Repo id must\nbe"),
        ["Repo id must be", "check the name"],
    ),
    "server": ("repo_info", http(HfHubHTTPError, "500 Server Error:\nInternal"), ["500 Server Error", "then again"]),
    "no network": ("repo_info", ConnectionError("[Errno -2] Name\nnot known"), ["Name not known", "the network"]),
    "offline": ("repo_info", OfflineModeIsEnabled("HF_HUB_OFFLINE=1\nis set"), ["HF_HUB_OFFLINE", "not downloaded"]),
    "lost": ("model.safetensors", LocalEntryNotFoundError("Cannot\nfind"), ["Cannot find", "the network", "resumes"]),
    "timeout": ("model.safetensors", TimeoutError("timed out"), ["timed out", "the network", "resumes"]),
    "disk full": ("model.safetensors", OSError(errno.ENOSPC, "No space left on device"), ["No space left on device"]),
    "read-only": (
        "config.json",
        PermissionError(errno.EACCES, "Permission denied", "checkpoints"),
        ["Permission denied"],
    ),
}


@pytest.mark.parametrize("where, error, says", FAILURES.values(), ids=FAILURES)
def test_a_failure_ends_in_one_line_and_status_1(
    hub: Hub, where: str, error: Exception, says: list[str], status: Callable, capsys: pytest.CaptureFixture
) -> None:
    """Whatever the hub's client raises, however many lines its message has."""
    hub.fails[where] = error
    assert status() == 1
    assert_one_line(capsys, says)


@pytest.mark.parametrize("error", [ConnectionError("reset"), KeyboardInterrupt()])
def test_what_was_fetched_before_an_interruption_is_not_fetched_again(
    hub: Hub, error: BaseException, status: Callable, capsys: pytest.CaptureFixture
) -> None:
    """The second run finishes the first, in the same folder."""
    hub.files = TEXTS | SHARDS
    hub.fails["model-00002-of-00002.safetensors"] = error
    assert status() == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert "Traceback" not in capsys.readouterr().err
    assert "model-00001-of-00002.safetensors" in hub.fetched
    hub.fails.clear()
    assert status() == 0
    assert sorted(hub.fetched) == sorted(TEXTS | SHARDS)


def assert_one_line(capsys: pytest.CaptureFixture, says: list[str]) -> None:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    for part in says:
        assert part in captured.err
