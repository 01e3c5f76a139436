"""Every way a Hugging Face directory can be laid out gives the same checkpoint."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantize import load_model, read_checkpoint, write_checkpoint
from scripts.convert_hf_checkpoint import convert, model_args, read_tensors

ROOT = Path(__file__).parents[1]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(convert(folder, "float32")).model


def test_every_format_of_weights_converts_to_the_same_tensors(random_llama) -> None:
    """One file or shards, safetensors or .bin, zip or legacy."""
    reference, folder = random_llama()
    expected, state = {k: v.clone() for k, v in weights(folder).items()}, reference.state_dict()
    single = folder / "model.safetensors"

    def use_bin(legacy: bool) -> None:
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)

    def use_sharded_safetensors() -> None:
        reference.save_pretrained(folder, max_shard_size="100KB")

    def use_sharded_bin() -> None:
        names = list(state)
        for i in range(3):
            torch.save({name: state[name] for name in names[i::3]}, folder / f"pytorch_model-{i:05}-of-00003.bin")
        (folder / "pytorch_model.bin.index.json").write_text("not looked at")

    for layout in (lambda: use_bin(False), lambda: use_bin(True), use_sharded_bin, use_sharded_safetensors):
        for old in [*folder.glob("*.safetensors*"), *folder.glob("*.bin*")]:
            old.unlink()
        layout()
        assert not single.exists()
        converted = weights(folder)
        assert converted.keys() == expected.keys()
        assert all(torch.equal(converted[name], expected[name]) for name in expected)


def test_safetensors_win_over_bin(random_llama) -> None:
    reference, folder = random_llama()
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    assert dict(read_tensors(folder)).keys() == reference.state_dict().keys()


def test_unaligned_safetensors_are_read(random_llama, tmp_path: Path) -> None:
    """The format does not promise that tensors start at multiples of their item size."""
    _, folder = random_llama()
    path = folder / "model.safetensors"
    expected, content = {k: v.clone() for k, v in read_tensors(path.parent)}, path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip() + b" "
    header += b" " * (1 - len(header) % 2)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read_tensors(path.parent))


def test_both_spellings_of_the_config_are_one_shape(random_llama) -> None:
    scaling = {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2.0}
    _, folder = random_llama(rope_parameters=scaling)
    new = json.loads((folder / "config.json").read_text())
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype", "head_dim")}
    old |= {"rope_theta": 20000.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float32"}
    assert model_args(new) == model_args(old)
    assert model_args(new).rope_theta == 20000.0
    assert model_args(new).rope_scale == 2.0


def test_tied_embeddings_are_stored_once(demo) -> None:
    checkpoint = read_checkpoint(demo["target"])
    model = load_model(checkpoint, "cpu", torch.bfloat16)
    assert model.output.weight.data_ptr() == model.tok_embeddings.weight.data_ptr()
    tied = checkpoint.model["output.weight"]
    total = sum(tensor.nbytes for tensor in checkpoint.model.values()) - tied.nbytes
    assert total < demo["target"].stat().st_size < total + 200_000


def test_loading_maps_the_file(demo) -> None:
    """Weights that need no conversion are not copied: their memory belongs to the file."""
    model = load_model(read_checkpoint(demo["target"]), "cpu", torch.bfloat16)
    address = model.layers[0].attention.wqkv.weight.data_ptr()
    ranges = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    inside = [r for r in ranges if int(r[0].split("-")[0], 16) <= address < int(r[0].split("-")[1], 16)]
    assert inside[0][-1] == str(demo["target"])


def test_chat_template_is_recorded(random_llama) -> None:
    _, folder = random_llama()
    assert not read_checkpoint(convert(folder, "bfloat16")).header["chat"]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "[INST] <<SYS>>"}))
    assert read_checkpoint(convert(folder, "bfloat16")).header["chat"]


def test_each_conversion_has_an_id_of_its_own(random_llama) -> None:
    _, folder = random_llama()
    first = read_checkpoint(convert(folder, "bfloat16")).header["id"]
    assert first != read_checkpoint(convert(folder, "bfloat16")).header["id"]


def test_a_failed_write_leaves_the_old_file(random_llama) -> None:
    _, folder = random_llama()
    path = convert(folder, "bfloat16")
    before, content = path.read_bytes(), read_checkpoint(path)

    def fail(mapped: dict) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_checkpoint(path, {}, {"a": torch.empty(4)}, fail)
    assert path.read_bytes() == before
    assert content.path == path
    assert [file.name for file in folder.glob("*tmp*")] == []


def test_prepare_converts_a_local_directory_from_anywhere(demo, tmp_path: Path) -> None:
    """prepare.sh DIR --precision float32, called from another directory with a relative path."""
    shutil.copytree(Path(__file__).parent / "demo" / "draft", tmp_path / "some" / "model")
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [ROOT / "scripts" / "prepare.sh", "some/model", "--precision", "float32"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert read_checkpoint(tmp_path / "some/model/model.pth").model["norm.weight"].dtype == torch.float32
