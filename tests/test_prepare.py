"""scripts/prepare.sh against a fake Hugging Face hub, with the real client; scripts/environment.sh against a fake pip.

The scripts run as a user runs them, in a folder that stands for this repository, with its own checkpoints/ and .venv.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Event, Thread
from urllib.parse import unquote, urlsplit

import pytest
import torch
from conftest import DEMO, ROOT
from safetensors.torch import save

from checkpoint import read_checkpoint
from scripts.convert_hf_checkpoint import read_safetensors

REPO = "someone/llama-tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FOLDER = Path("checkpoints", REPO)
WROTE = f"wrote {FOLDER}/model.pth"
TEXTS = {name: (DEMO / "draft" / name).read_bytes() for name in ("config.json", "tokenizer.model")}
TENSORS = {name: read() for name, read in read_safetensors(DEMO / "draft" / "model.safetensors")}
CHAT = {
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages[0].content }}",
    "generation_config.json": b"{}",
}
CHAT |= {"tokenizer.json": b"{}", "added_tokens.json": b"{}"}
UNUSED = dict.fromkeys(
    [
        ".gitattributes", "README.md", "vocab.json", "modeling.py", "training_args.bin", "consolidated.00.pth",
        "original/consolidated.00.pth", "original/model.safetensors", "onnx/model.onnx", "onnx/config.json",
    ],
    b"of no use",
)  # fmt: skip


def save_bin(tensors: dict[str, torch.Tensor]) -> bytes:
    file = BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


def shards(whole: str, save: Callable[[dict], bytes]) -> dict[str, bytes]:
    """Two files and their index, as Hugging Face's libraries write a file that is too large for one."""
    stem, ending = whole.rsplit(".", 1)
    names = sorted(TENSORS)
    parts = {f"{stem}-0000{i + 1}-of-00002.{ending}": names[i::2] for i in range(2)}
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    files = {file: save({name: TENSORS[name] for name in part}) for file, part in parts.items()}
    return files | {f"{whole}.index.json": json.dumps(index).encode()}


WHOLE = {"model.safetensors": save(TENSORS)}
WHOLE_BIN = {"pytorch_model.bin": save_bin(TENSORS)}
SHARDS = shards("model.safetensors", save)
BIN_SHARDS = shards("pytorch_model.bin", save_bin)
LAST_SHARD = "model-00002-of-00002.safetensors"
CHUNK = 10 << 20  # bytes that the client writes at a time


class Hub(ThreadingHTTPServer):
    """One repository in memory, served as by huggingface.co. `fails`: (the start of a path, status, X-Error-Code)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.files = TEXTS | WHOLE
        self.fails = ("nothing", 0, "")
        self.cut = ""  # the file in whose middle the connection ends
        self.begun = Event()  # set when half of it was sent
        self.heals = False  # True: later requests for it are answered
        self.fetched: list[str] = []  # files whose content was asked for

    def handle_error(self, *_: object) -> None:
        pass  # clients that went away


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        start, status, code = hub.fails
        if hub.begun.is_set() and hub.cut and path.endswith(hub.cut) and not hub.heals:
            self.close_connection = True
        elif path.startswith(start):
            self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": "as the test wants it"})
        elif path.startswith(f"/api/models/{REPO}/revision/"):
            self.answer_json({"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": name} for name in hub.files]})
        elif path == f"/api/models/{REPO}/tree/{COMMIT}":
            digests = {name: hashlib.sha1(content).hexdigest() for name, content in hub.files.items()}
            entry = {name: {"path": name, "size": len(hub.files[name]), "oid": oid} for name, oid in digests.items()}
            self.answer_json([{"type": "file"} | each for each in entry.values()])
        elif (name := path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")) in hub.files:
            self.answer_file(name, hub.files[name])
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound" if REPO in path else "RepoNotFound"})

    do_HEAD = do_GET

    def answer_json(self, content: object) -> None:
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer_file(self, name: str, content: bytes) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.command == "GET":
            self.server.fetched.append(f"{name} from byte {start}" if start else name)
        cut = self.command == "GET" and name == self.server.cut and not self.server.begun.is_set()
        self.answer(206 if start else 200, content[start:], headers, cut)

    def answer(self, status: int, body: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True
            self.server.begun.set()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the scripts and links to the programs that they run, with its own .venv and checkpoints/."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), ROOT / "kernels"]:
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture
def prepare(project: Path, hub: Hub, tmp_path: Path) -> Callable:
    """A function: runs ./scripts/prepare.sh with these words, and with the fake hub instead of the real one.

    Between two attempts the client waits for a hundredth of a second only.
    """
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import time\nwait = time.sleep\ntime.sleep = lambda _: wait(0.01)"
    )

    def run(
        *words: object, cwd: Path = project, script: str = "./scripts/prepare.sh", **environment: str
    ) -> subprocess.CompletedProcess:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        settings = {
            "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "*", "no_proxy": "*",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5", "HF_HUB_ETAG_TIMEOUT": "5", "PYTHONPATH": str(tmp_path / "site"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        return subprocess.run(
            [script, *words], cwd=cwd, env=inherited | settings | environment,
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    return run


def without_indices(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.endswith(".index.json")]


def assert_wrote(result: subprocess.CompletedProcess, project: Path) -> None:
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert result.stderr.splitlines()[-1] == WROTE
    assert (project / FOLDER / "model.pth").exists()


def assert_one_line(result: subprocess.CompletedProcess, says: str) -> None:
    """Status 1, and one line on stderr with these words in this order."""
    assert (result.returncode, result.stdout) == (1, ""), result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert re.search(".*".join(map(re.escape, says.split(" ... "))), result.stderr), result.stderr


@pytest.mark.parametrize(
    "offered, taken",
    [
        pytest.param(WHOLE, WHOLE, id="safetensors", marks=pytest.mark.slow),
        pytest.param(SHARDS, SHARDS, id="shards", marks=pytest.mark.slow),
        pytest.param(WHOLE_BIN, WHOLE_BIN, id="bin", marks=pytest.mark.slow),
        pytest.param(BIN_SHARDS, BIN_SHARDS, id="bin shards", marks=pytest.mark.slow),
        pytest.param(WHOLE | BIN_SHARDS, WHOLE, id="both"),
    ],
)
def test_one_format_of_weights_is_fetched_and_nothing_that_is_not_read(
    hub: Hub, prepare: Callable, project: Path, offered: dict, taken: dict
) -> None:
    """Safetensors if there are both. (The index of the other format is a small file, and may be fetched.)"""
    hub.files = TEXTS | CHAT | UNUSED | offered
    result = prepare(REPO)
    assert_wrote(result, project)
    assert "No files matched" not in result.stderr
    wanted = TEXTS | CHAT | taken
    assert sorted(without_indices(hub.fetched)) == sorted(without_indices(wanted))
    assert wanted.keys() <= set(hub.fetched)
    assert read_checkpoint(project / FOLDER / "model.pth").tokenizer.chat_template == "{{ messages[0].content }}"


@pytest.mark.parametrize(
    "name, says",
    [
        ("tokenizer.model", "no tokenizer.model or tokenizer.json"),
        ("config.json", "no config.json"),
        ("model.safetensors", "no weights in safetensors or .bin"),
    ],
)
def test_a_repository_that_cannot_be_converted_is_refused_before_its_weights_are_fetched(
    hub: Hub, prepare: Callable, name: str, says: str
) -> None:
    hub.files = TEXTS | WHOLE | UNUSED
    del hub.files[name]
    assert_one_line(prepare(REPO), f"{REPO} has {says}")
    assert set(hub.fetched) <= TEXTS.keys()


NAME, LICENCE = "check the name", "licence ... hf auth login"
RESOLVE = f"/{REPO}/resolve/{COMMIT}/"
FAILURES = {
    "gated": ((RESOLVE, 403, "GatedRepo"), f"requires approval ... {LICENCE}"),
    "gated, not logged in": ((RESOLVE, 401, "GatedRepo"), f"requires approval ... {LICENCE}"),
    "gated with its list of files": (("/api/", 403, "GatedRepo"), f"requires approval ... {LICENCE}"),
    "gated weights": ((f"{RESOLVE}model", 403, "GatedRepo"), f"requires approval ... {LICENCE}"),
    "unknown": (("/api/", 404, "RepoNotFound"), f"'{REPO}' not found ... {NAME}"),
    "unknown, not logged in": (("/api/", 401, "RepoNotFound"), f"'{REPO}' not found ... {NAME} ... hf auth login"),
    "server": (("/", 500, ""), "500 Internal Server Error ... the network, then again"),
    "server, one file": ((f"{RESOLVE}config", 503, ""), "503 Service Unavailable ... the network, then again"),
    "server, weights": ((f"{RESOLVE}model", 503, ""), "503 Service Unavailable ... the network, then again"),
}


@pytest.mark.parametrize("fails, says", FAILURES.values(), ids=FAILURES)
def test_a_refusal_of_the_hub_is_one_line(hub: Hub, prepare: Callable, fails: tuple, says: str) -> None:
    """The cause, then the fix."""
    hub.fails = fails
    assert_one_line(prepare(REPO), f"{REPO} was not downloaded ( ... {says}")
    assert "model.safetensors" not in hub.fetched


def test_the_cause_is_named_if_an_earlier_run_left_files(hub: Hub, prepare: Callable) -> None:
    """The client's last line then names their folder, not the cause."""
    hub.fails = FAILURES["gated"][0]
    assert_one_line(prepare(REPO), "requires approval")
    assert_one_line(prepare(REPO, HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE ... the network, then again")


@pytest.mark.parametrize("name", ["", "../x", "a/b/c", "-x", "no such/directory", "/no/such/directory"])
def test_a_wrong_name_is_one_line(prepare: Callable, project: Path, name: str) -> None:
    assert_one_line(prepare(name), f"{name} was not downloaded (Invalid value. Repo id must ... {NAME} ... directory")
    assert not (project / "checkpoints").exists()


@pytest.mark.parametrize(
    "environment, says",
    [({"HF_ENDPOINT": "http://127.0.0.1:1"}, "Connection refused"), ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE")],
    ids=["unreachable", "offline"],
)
def test_no_network_is_one_line(prepare: Callable, environment: dict, says: str) -> None:
    assert_one_line(prepare(REPO, **environment), f"{REPO} was not downloaded ( ... {says} ... the network, then again")


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment", [{"HF_ENDPOINT": "http://127.0.0.1:1"}, {"HF_HUB_OFFLINE": "1"}], ids=["unreachable", "offline"]
)
def test_without_a_network_the_hubs_own_cache_will_do(
    prepare: Callable, project: Path, tmp_path: Path, environment: dict
) -> None:
    """Its files are linked, not copied, and are as they were."""
    repository = tmp_path / "hf" / "hub" / f"models--{REPO.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for name, content in (TEXTS | WHOLE).items():
        (snapshot / name).write_bytes(content)
    result = prepare(REPO, **environment)
    assert result.returncode == 0, result.stderr
    assert f"taking {REPO} from its cache" in result.stderr and result.stderr.splitlines()[-1] == WROTE
    assert (project / FOLDER / "model.safetensors").is_symlink()
    assert sorted(path.name for path in snapshot.iterdir()) == sorted(TEXTS | WHOLE)


@pytest.mark.slow
def test_prepare_finds_its_neighbours_through_a_link(prepare: Callable, project: Path, tmp_path: Path) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    for name, content in (TEXTS | WHOLE).items():
        (tmp_path / "here" / "model" / name).write_bytes(content)
    (tmp_path / "here" / "prepare").symlink_to(project / "scripts" / "prepare.sh")
    result = prepare("model", cwd=tmp_path / "here", script="./prepare")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "here" / "model" / "model.pth").exists()


@pytest.mark.slow
def test_whole_files_are_not_fetched_again_after_a_lost_connection(hub: Hub, prepare: Callable, project: Path) -> None:
    """The client's lines about its attempts, then ours; if an attempt is answered, it goes on."""
    hub.files, hub.cut = TEXTS | SHARDS, LAST_SHARD
    hub.files[LAST_SHARD] += bytes(2 * CHUNK)
    result = prepare(REPO)
    assert (result.returncode, result.stdout) == (1, "")
    theirs, ours = result.stderr.splitlines()[-2:]
    assert theirs.startswith("Error: ") and "disconnected" in theirs
    assert re.fullmatch(f"{REPO} was not downloaded .*the network, then again.*", ours)
    assert "Traceback" not in result.stderr
    assert not (project / FOLDER / LAST_SHARD).exists()
    hub.fetched.clear()
    hub.begun.clear()
    hub.heals = True
    assert_wrote(prepare(REPO), project)
    assert hub.fetched == [LAST_SHARD, f"{LAST_SHARD} from byte {CHUNK}"]


@pytest.mark.slow
def test_links_in_the_way(hub: Hub, prepare: Callable, project: Path, tmp_path: Path) -> None:
    """HF_HOME, checkpoints/ and the project are links to folders elsewhere; weights in both formats, with an index."""
    hub.files = TEXTS | SHARDS | BIN_SHARDS
    for name in ("home of hf", "large disk"):
        (tmp_path / name).mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "home of hf")
    (project / "checkpoints").symlink_to(tmp_path / "large disk")
    (tmp_path / "link").symlink_to(project)
    assert_wrote(prepare(REPO, cwd=tmp_path / "link", HF_HOME=str(tmp_path / "home")), project)
    assert sorted(without_indices(hub.fetched)) == sorted(without_indices(TEXTS | SHARDS))
    assert any((tmp_path / "home of hf").iterdir())
    assert (tmp_path / "large disk" / REPO / "model.pth").exists()


@pytest.mark.slow
def test_settings_of_the_shell_do_not_matter(prepare: Callable, project: Path, tmp_path: Path) -> None:
    """A local directory, by a relative name that CDPATH has as well, with a space."""
    for place in ("here", "elsewhere"):
        (tmp_path / place / "a model").mkdir(parents=True)
    for name, content in (TEXTS | WHOLE).items():
        (tmp_path / "here" / "a model" / name).write_bytes(content)
    paths = f"{tmp_path}/elsewhere:{project.parent}:."
    result = prepare("a model", cwd=tmp_path / "here", script="../project/scripts/prepare.sh", CDPATH=paths)
    model = tmp_path / "here" / "a model" / "model.pth"
    said = f"reading {model.with_name('model.safetensors')}\nwrote {model}\n"
    assert (result.returncode, result.stdout, result.stderr) == (0, "", said)
    assert model.exists()


# ---- scripts/environment.sh


@pytest.fixture
def environment(project: Path, tmp_path: Path) -> Callable:
    """A function: sources environment.sh, and returns its status, its python, and the calls of pip and their callers.

    Virtual environments are real, but without pip: a module in its place writes down how it is called.
    """
    log, tools = tmp_path / "log", tmp_path / "tools"
    (tmp_path / "pip").mkdir()
    code = f"import os, sys\nprint(sys.prefix, *sys.argv[1:], file=open({str(log)!r}, 'a'))\n"
    (tmp_path / "pip" / "pip.py").write_text(code + "sys.exit(int(os.environ.get('PIP_STATUS', 0)))")
    tools.mkdir()
    (tools / "python3").write_text(
        f'''#!/bin/sh
        if [ "$2" = venv ] && [ -n "$KILLED" ]; then
            mkdir -p .venv/bin && touch .venv/half && exit 130
        fi
        [ "$2" != venv ] || set -- "$@" --without-pip
        exec "{sys.executable}" "$@"'''
    )
    (tools / "python3").chmod(0o755)
    (tools / "python").symlink_to("python3")
    (project / "requirements.txt").write_text("first\n")

    def run(**settings: str) -> tuple[int, str, list[str]]:
        log.write_text("")
        inherited = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
        fixed = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path / "pip"), "KILLED": ""}
        command = "set -euo pipefail; . scripts/environment.sh requirements.txt; command -v python"
        result = subprocess.run(
            ["bash", "-c", command], cwd=project, env=inherited | fixed | settings, capture_output=True,
            text=True,
        )  # fmt: skip
        return result.returncode, result.stdout.strip(), log.read_text().splitlines()

    return run


def test_a_half_made_environment_is_made_anew(environment: Callable, project: Path) -> None:
    """An interrupted run leaves no mark; a whole environment is taken as it is."""
    status, _, asked = environment(KILLED="1")
    assert status == 130 and asked == []
    status, python, _ = environment()
    assert (status, python) == (0, f"{project}/.venv/bin/python")
    assert not (project / ".venv" / "half").exists()
    (project / ".venv" / "kept").touch()
    assert environment() == (0, python, [])
    assert (project / ".venv" / "kept").exists()


def test_pip_is_asked_until_it_has_finished_and_not_again(environment: Callable, project: Path) -> None:
    """A finished installation leaves a copy of the requirements."""
    install = f"{project}/.venv install --quiet --disable-pip-version-check -r requirements.txt"
    status, python, asked = environment(PIP_STATUS="130")
    assert (status, python, asked) == (130, "", [install])
    assert environment()[::2] == (0, [install])
    assert environment()[::2] == (0, [])
    (project / "requirements.txt").write_text("second\n")
    assert environment()[::2] == (0, [install])
    assert environment()[::2] == (0, [])


def test_the_active_environment_is_used_whatever_python_is_on_the_path(
    environment: Callable, project: Path, tmp_path: Path
) -> None:
    """VIRTUAL_ENV alone names it; CDPATH does not disturb."""
    (tmp_path / "elsewhere" / "scripts").mkdir(parents=True)
    active = tmp_path / "my own"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", active], check=True)
    status, python, asked = environment(VIRTUAL_ENV=str(active), CDPATH=f"{tmp_path}/elsewhere")
    assert (status, python) == (0, f"{active}/bin/python")
    assert [line.startswith(f"{active} install ") for line in asked] == [True]
    assert environment(VIRTUAL_ENV=str(active)) == (0, python, [])
    assert not (project / ".venv").exists()
