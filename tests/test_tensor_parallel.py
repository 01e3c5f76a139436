"""Tensor parallelism: the text of one process for any number of ranks, a part of the memory, an end in every case."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TOKENIZER, assert_close

import tp
from benchmarks.grow import shape_args
from checkpoint import GROUPSIZES, empty_model, read_checkpoint
from model import ModelArgs
from quantize import quantize
from scripts.files import new_checkpoint

TEXT = "def read_file(path):\n    with open(path) as file:\n        return file.read()\n\n\ndef write_file("
GQA = ModelArgs(256, 2, 8, 4, 128, 1024, 2048, 1e-5, 10000.0, 1.0, 512)
ODD = ModelArgs(64, 1, 3, 3, 32, 96, 2048, 1e-5, 10000.0, 1.0, 512)  # a draft that cannot be divided by two
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def write_random(path: Path, args: ModelArgs, quantization: dict | None = None, zeros: bool = False) -> None:
    """A checkpoint with the demo's tokenizer."""
    generator = torch.Generator().manual_seed(0)
    header = {"config": asdict(args), "quantization": quantization, "tokenizer": asdict(TOKENIZER)}
    tensors = empty_model(args, quantization, torch.bfloat16).to_empty(device="cpu").state_dict()
    with new_checkpoint(path, header, tensors) as mapped:
        for name, tensor in () if zeros else mapped.items():
            spread = 0.3 if "norm" in name else tensor.shape[-1] ** -0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread)


@pytest.fixture(scope="module")
def folder(demo: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models at 16, 8 and 4 bits, a draft of each, and prompts."""
    folder = tmp_path_factory.mktemp("ranks")
    shutil.copyfile(demo["target"], folder / "target_float.pth")
    shutil.copyfile(demo["draft"], folder / "target.draft.pth")
    write_random(folder / "gqa_float.pth", GQA)
    write_random(folder / "gqa.draft.pth", ODD)
    for name in ("target", "gqa"):
        original = read_checkpoint(folder / f"{name}_float.pth")
        quantize(original, {"mode": "int8"}, "cpu", folder / f"{name}_int8.pth")
        for size in GROUPSIZES:
            quantize(original, {"mode": "int4", "groupsize": size}, "cpu", folder / f"{name}_int4.g{size}.pth")
    prompts = [TOKENIZER.bos_ids, [*TOKENIZER.bos_ids, *TOKENIZER.encode(TEXT)]]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return folder


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def ranks(count: int, *words: str | Path) -> list[subprocess.Popen]:
    """`count` processes of one group, started as torchrun would; 0: one process without a group."""
    group = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    environments = [{"RANK": rank, "LOCAL_RANK": rank} | group for rank in range(count)] or [{}]
    return [start(environment, *words) for environment in environments]


def start(environment: dict, *words: str | Path) -> subprocess.Popen:
    """One process with more in its environment."""
    added = {name: str(value) for name, value in environment.items()}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, env=os.environ | added, **pipes)


def ended(processes: list[subprocess.Popen], seconds: float = 300) -> list[tuple[int, str, str]]:
    """Status, stdout and stderr of each."""
    outputs = [process.communicate(timeout=seconds) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


@pytest.fixture(scope="module")
def results(folder: Path) -> Callable[[int], dict]:
    """A function: number of ranks -> their results."""

    @cache
    def run(count: int) -> dict:
        path = folder / f"results-{count}.json"
        done = ended(ranks(count, "-m", "tests.ranks", "text", folder, path))
        assert all(status == 0 for status, _, _ in done), done
        return json.loads(path.read_text())

    return run


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_text_does_not_change_with_the_number_of_ranks(results: Callable[[int], dict], count: int) -> None:
    """Greedy and sampled, plain and speculative, cached and compiled, in 16, 8 and 4 bits with every group size."""
    alone, shared = ({name: found for name, found in results(n).items() if name != "bfloat16"} for n in (0, count))
    assert alone.keys() == shared.keys() and len(shared) == 12
    for name, found in shared.items():
        if "refused" in found:
            size = int(name.split(".g")[1].removesuffix(".pth"))
            assert f"is no multiple of {count} ranks" in found["refused"]
            assert name.startswith("target") and (256 // count % size or 768 // count % size)
            continue
        assert found["ids"] == alone[name]["ids"], name
        assert_close(torch.tensor(found["logits"]), torch.tensor(alone[name]["logits"]))
        for path, ids in found["ids"].items():
            plain = found["ids"][path.split()[0]]
            assert ids == plain[-len(ids) :], (name, path)
    assert sum("refused" in found for found in shared.values()) == {1: 0, 2: 1, 4: 2}[count]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_speculation_does_not_change_the_text_in_bfloat16_either(results: Callable[[int], dict], count: int) -> None:
    """A row of many is bit for bit that row alone if ranks add up their parts of it, too."""
    found = results(count)["bfloat16"]
    for one, other in found.values():
        assert one == other
    assert len(found["ids"][0]) == 32


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_ranks_find_their_own_parts_of_a_prefix_and_no_others(
    results: Callable[[int], dict], folder: Path, count: int
) -> None:
    """All numbers of ranks use one folder, but not the files of each other; one rank is like none."""
    results(0)
    length = len(json.loads((folder / "prompts.json").read_text())[-1])
    for name, found in results(count).items():
        if name != "bfloat16" and "refused" not in found:
            blocks = (length - 1) // 16 * 16
            assert blocks > 16
            assert found["cached"] == {"first": blocks if count == 1 else 0, "again": blocks}, name


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, {"mode": "int4", "groupsize": 32}], ids=["16 bits", "4 bits"])
def test_a_rank_has_its_part_of_the_weights_in_memory(tmp_path: Path, quantization: dict | None) -> None:
    """1.1b: the model adds its part of the layers to anonymous memory; the rest is mapped, not copied."""
    write_random(tmp_path / "model.pth", shape_args("1.1b", 2048), quantization, zeros=True)
    weights = read_checkpoint(tmp_path / "model.pth").state_dict
    size = sum(tensor.nbytes for name, tensor in weights.items() if name.startswith("layers."))
    for count in (2, 4):
        done = ended(ranks(count, "-m", "tests.ranks", "memory", tmp_path, tmp_path / "results.json"))
        assert all(status == 0 for status, _, _ in done), done
        for before, after in json.loads((tmp_path / "results.json").read_text()):
            assert 0.95 * size / count < after["RssAnon"] - before["RssAnon"] < 1.05 * size / count + 1e8


def torchrun(count: int, *words: str | Path, **options: object) -> subprocess.Popen:
    pipes = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "cwd": ROOT,
    }
    command = [*TORCHRUN, "--standalone", f"--nproc_per_node={count}", *map(str, words)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **(pipes | options))


def alone(*words: str | Path, text: str | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, input=text, capture_output=True, text=True, check=True
    )


@pytest.mark.slow
def test_torchrun_answers_like_python_and_only_rank_0_prints(folder: Path) -> None:
    words = ["--checkpoint_path", folder / "target_float.pth", "--precision", "float32", "--max_new_tokens", "20"]
    words += ["--prompt", "-"]
    plain = alone("generate.py", *words, text=TEXT)
    process = torchrun(2, "generate.py", *words, stdin=subprocess.PIPE)
    stdout, stderr = process.communicate(TEXT, timeout=300)
    assert (process.returncode, stdout) == (0, plain.stdout), stderr
    assert [line.split(":")[0] for line in stderr.splitlines()] == [
        line.split(":")[0] for line in plain.stderr.splitlines()
    ]


@pytest.mark.slow
def test_torchrun_saves_prefixes_for_each_rank(folder: Path, tmp_path: Path) -> None:
    words = ["generate_prefill.py", "--checkpoint_path", folder / "target_int8.pth", "--precision", "float32"]
    words += ["--max_new_tokens", "8", "--cache_dir", tmp_path / "prefixes", "--system", TEXT * 2, "--prompt", "import"]
    plain = alone(*words)
    for cached in ("(cached 0 of", "(cached 64 of"):
        [(status, stdout, stderr)] = ended([torchrun(2, *words)])
        assert (status, stdout) == (0, plain.stdout), stderr
        assert cached in stderr


@pytest.mark.slow
def test_torchrun_holds_a_conversation_and_ends_with_its_input(folder: Path) -> None:
    words = [
        "generate.py",
        "--checkpoint_path",
        folder / "target_int4.g32.pth",
        "--precision",
        "float32",
        "--interactive",
    ]
    words += ["--max_new_tokens", "8", "--prompt_lookup"]
    lines = "import os\n\n/stats\n/clear\ndef f(x):\n    return\n"
    process = torchrun(2, *words, stdin=subprocess.PIPE)
    stdout, stderr = process.communicate(lines, timeout=300)
    assert (process.returncode, stdout) == (0, alone(*words, text=lines).stdout), stderr
    assert stderr.count("Prompt tokens") == 1


@pytest.mark.parametrize(
    "name, count, cause",
    [
        ("target_float.pth", 3, "n_head = 8 is no multiple of 3 ranks"),
        pytest.param(
            "target_int4.g256.pth", 2, "groups of wo's inputs = 1 is no multiple of 2 ranks", marks=pytest.mark.slow
        ),
        pytest.param("none.pth", 2, "none.pth: No such file", marks=pytest.mark.slow),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused_by_name(folder: Path, name: str, count: int, cause: str) -> None:
    done = ended(ranks(count, "generate.py", "--checkpoint_path", folder / name))
    assert [(status, stdout) for status, stdout, _ in done] == [(1, "")] * count
    (line,) = "".join(stderr for _, _, stderr in done).splitlines()
    assert cause in line


@pytest.mark.slow
def test_an_error_of_another_rank_is_the_one_line(folder: Path, tmp_path: Path) -> None:
    """Only the second rank finds no model: its cause is told, and not that a rank has ended."""
    (tmp_path / "1").mkdir()
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport generate, tp\n"
        f"sys.argv += ['--checkpoint_path', {str(folder / 'gqa_int8.pth')!r} if tp.RANK == 0 else 'none.pth']\n"
        "tp.run(generate.main)\n"
    )
    for process in (torchrun(2, script), None):
        outputs = ended([process] if process else ranks(2, script))
        lines = [line for _, _, stderr in outputs for line in stderr.splitlines() if ".pth" in line or "ended" in line]
        assert len(lines) == 1 and "none.pth: No such file" in lines[0], outputs
        assert all(status == 1 for status, _, _ in outputs)


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_missed_after_some_seconds(folder: Path) -> None:
    group = {"RANK": 0, "WORLD_SIZE": 3, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    words = ["generate.py", "--checkpoint_path", folder / "gqa_int8.pth", "--max_new_tokens", "4"]
    first = start(group, *words)
    second = start(group | {"RANK": 1}, *words)
    assert first.stderr.readline() == "waiting for 1 of 3 ranks\n"
    third = start(group | {"RANK": 2}, *words)
    assert [status for status, _, _ in ended([first, second, third])] == [1] * 3  # 8 heads for 3 ranks


@pytest.mark.slow
def test_a_draft_that_cannot_be_divided_is_whole_on_each_rank(folder: Path, tmp_path: Path) -> None:
    """Here for its groups: four ranks would have 64 inputs each, half a group."""
    quantize(
        read_checkpoint(folder / "target.draft.pth"), {"mode": "int4", "groupsize": 128}, "cpu", tmp_path / "draft.pth"
    )
    words = [
        "generate.py",
        "--checkpoint_path",
        folder / "target_float.pth",
        "--precision",
        "float32",
        "--max_new_tokens",
        "8",
    ]
    words += ["--draft_checkpoint_path", tmp_path / "draft.pth"]
    first, *others = ended(ranks(4, *words))
    assert first[:2] == (0, alone(*words).stdout)
    assert all(other == (0, "", "") for other in others)


@pytest.mark.slow
def test_text_from_a_file_is_that_of_the_first_rank(folder: Path, tmp_path: Path) -> None:
    """The file may be on one host only, or be standard input."""
    words = [
        "generate_prefill.py",
        "--checkpoint_path",
        folder / "target_float.pth",
        "--max_new_tokens",
        "4",
        "--no_cache",
    ]
    words += ["--precision", "float32", "--system", "@/dev/stdin", "--prompt", "import"]
    process = torchrun(2, *words, stdin=subprocess.PIPE)
    stdout, stderr = process.communicate(TEXT, timeout=100)
    assert (process.returncode, stdout) == (0, alone(*words, text=TEXT).stdout), stderr


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--help"], ["--no_such_flag"], ["--prompt", "-"]], ids=" ".join)
def test_only_rank_0_prints_errors_of_flags_and_input(folder: Path, words: list[str]) -> None:
    words = ["generate.py", "--checkpoint_path", folder / "target_float.pth", *words]
    plain = subprocess.run([sys.executable, *words], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    first, other = ended(ranks(2, *words))
    assert first == (plain.returncode, plain.stdout, plain.stderr)
    assert other == (plain.returncode, "", "")


@pytest.mark.slow
def test_an_address_that_is_not_there_is_one_line(folder: Path) -> None:
    group = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    process = start(
        group | {"GLOO_SOCKET_IFNAME": "none0"}, "generate.py", "--checkpoint_path", folder / "gqa_float.pth"
    )
    ((status, stdout, stderr),) = ended([process])
    assert (status, stdout) == (1, "")
    assert "out of reach" in stderr and "none0" in stderr and len(stderr.splitlines()) == 1


def test_a_variable_that_torchrun_left_makes_no_rank(folder: Path) -> None:
    """LOCAL_RANK alone, as a shell may have it from a job that has ended."""
    ((status, stdout, stderr),) = ended(
        [start({"LOCAL_RANK": 0}, "generate.py", "--checkpoint_path", folder / "gqa_int8.pth")]
    )
    assert status == 0 and stdout and "Stopped" in stderr


def test_a_rank_that_waits_for_another_ends_when_it_is_stopped(folder: Path) -> None:
    """At once, as torchrun expects, and not after the half minute that it allows."""
    port = free_port()
    group = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    process = start(group, "generate.py", "--checkpoint_path", folder / "gqa_float.pth")
    while socket.socket().connect_ex(("localhost", port)):
        assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=20) == -signal.SIGTERM


@pytest.mark.slow
def test_ranks_need_no_numpy(folder: Path, tmp_path: Path) -> None:
    """requirements.txt does not bring it."""
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError('none here', name='numpy')")
    group = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    group["PYTHONPATH"] = tmp_path
    words = ["generate.py", "--checkpoint_path", folder / "target_int8.pth", "--max_new_tokens", "4"]
    first, other = ended([start(group | {"RANK": rank, "LOCAL_RANK": rank}, *words) for rank in range(2)])
    assert (first[0], other) == (0, (0, "", ""))
    assert first[1] and "Stopped" in first[2] and "umpy" not in first[2]


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tp, "STARTED_BY_TORCHRUN", True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="2 GPUs"):
        tp.init("cuda")


def children(parent: int) -> list[int]:
    """Process ids, oldest first: torchrun's ranks in their order."""
    found = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True).stdout.split()
    return sorted(map(int, found))


def talking(folder: Path, **options: object) -> subprocess.Popen:
    """Two ranks in the middle of an answer."""
    words = [
        "--checkpoint_path",
        folder / "gqa_float.pth",
        "--max_new_tokens",
        500,
        "--ignore_eos",
        "--num_samples",
        99,
    ]
    process = torchrun(2, "generate.py", *words, **options)
    assert process.stdout.read(1)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_when_a_rank_is_killed_all_end_with_a_message(folder: Path, rank: int) -> None:
    process = talking(folder)
    group = children(process.pid)
    assert len(group) == 2
    os.kill(group[rank], signal.SIGKILL)
    start = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and time.monotonic() - start < 45
    assert "SIGKILL" in stderr
    assert not any(Path(f"/proc/{pid}").exists() for pid in group)


@pytest.mark.slow
def test_ctrl_c_ends_all_ranks(folder: Path) -> None:
    process = talking(folder)
    group = children(process.pid)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in group)


HOSTS = """
set -e
ip link set lo up
ip link add left type veth peer name right
unshare --net sleep 300 &
other=$!
trap "kill $other" EXIT
while [ "$(readlink /proc/$other/ns/net)" = "$(readlink /proc/$$/ns/net)" ]; do sleep 0.1; done
ip link set right netns $other
ip addr add 10.9.8.1/24 dev left
ip link set left up
nsenter --net=/proc/$other/ns/net sh -c "ip link set lo up; ip addr add 10.9.8.2/24 dev right; ip link set right up"
run="$PYTHON -m torch.distributed.run --nnodes=2 --nproc_per_node=1 --rdzv-backend=c10d --rdzv-endpoint=10.9.8.1:29400"
export GLOO_SOCKET_IFNAME=right TP_SOCKET_IFNAME=right
nsenter --net=/proc/$other/ns/net $run --rdzv-conf=is_host=false --local-addr=10.9.8.2 "$@" > "$OTHER" 2>&1 &
second=$!
export GLOO_SOCKET_IFNAME=left TP_SOCKET_IFNAME=left
$run --rdzv-conf=is_host=true --local-addr=10.9.8.1 "$@"
wait $second
"""


@pytest.mark.slow
def test_two_hosts_answer_like_one(folder: Path, tmp_path: Path) -> None:
    """Two network namespaces, joined by a cable of their own; torchrun meets torchrun at an endpoint."""
    probe = subprocess.run(["unshare", "--net", "ip", "link", "add", "left", "type", "veth", "peer", "name", "right"])
    if probe.returncode:
        pytest.skip("network namespaces are not permitted here")
    words = [
        "generate.py",
        "--checkpoint_path",
        folder / "gqa_int8.pth",
        "--precision",
        "float32",
        "--max_new_tokens",
        "12",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "OTHER": str(tmp_path / "other")}
    command = ["unshare", "--net", "bash", "-c", HOSTS, "hosts", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, alone(*words).stdout), done.stderr + (tmp_path / "other").read_text()
    lines = (tmp_path / "other").read_text().splitlines()
    assert [line for line in lines if "hostname of the client socket" not in line] == []  # these two have no names
