"""Converting: every layout of a Hugging Face directory gives the same checkpoint; reading and writing checkpoints."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from bad_input_cases import CONFIG, LLAMA_3_ROPE
from conftest import DEMO, ROOT, TOKENIZER, generated, make_params, new_engine, typed

from checkpoint import load_model, read_checkpoint
from model import ModelArgs
from scripts.convert_hf_checkpoint import convert, model_args, read_weights
from scripts.convert_tokenizer import read_tokenizer
from scripts.files import STALE_SECONDS, new_checkpoint
from tokenizer import Tokenizer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(convert(folder, "float32")).state_dict


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
    assert read_weights(folder).keys() == reference.state_dict().keys()


def test_the_index_decides_which_files_are_read(random_llama) -> None:
    """Older shards, a second format and a consolidated file in the folder are not read."""
    reference, folder = random_llama()
    (folder / "model.safetensors").unlink()
    reference.save_pretrained(folder, max_shard_size="100KB")
    for name in ("model-00001-of-00099.safetensors", "pytorch_model.bin"):
        (folder / name).write_bytes(b"not looked at")
    assert read_weights(folder).keys() == reference.state_dict().keys()


def state_of(reference, **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A state_dict with these embed_tokens (`embeddings`) and lm_head (`output`); None leaves one out."""
    state = dict(reference.state_dict())
    names = {"embeddings": "model.embed_tokens.weight", "output": "lm_head.weight"}
    for key, tensor in changes.items():
        state.pop(names[key], None)
        if tensor is not None:
            state[names[key]] = tensor
    return state


def test_tied_embeddings_in_every_form(random_llama) -> None:
    """One tensor under either name is used for both; two that differ are both kept."""
    reference, folder = random_llama(tie_word_embeddings=True)
    embeddings = reference.state_dict()["model.embed_tokens.weight"].clone()
    other = embeddings + 1
    (folder / "model.safetensors").unlink()
    for changes, output in (
        ({"embeddings": embeddings, "output": None}, embeddings),
        ({"embeddings": None, "output": embeddings}, embeddings),
        ({"embeddings": embeddings, "output": embeddings.clone()}, embeddings),
        ({"embeddings": embeddings, "output": other}, other),
    ):
        torch.save(state_of(reference, **changes), folder / "pytorch_model.bin")
        model = weights(folder)
        assert torch.equal(model["tok_embeddings.weight"], embeddings)
        assert torch.equal(model["output.weight"], output)


def test_parameters_in_a_bin_are_tensors(random_llama) -> None:
    """As named_parameters() and state_dict(keep_vars=True) give them."""
    reference, folder = random_llama()
    expected = {name: tensor.clone() for name, tensor in weights(folder).items()}
    (folder / "model.safetensors").unlink()
    torch.save(dict(reference.named_parameters()), folder / "pytorch_model.bin")
    converted = weights(folder)
    assert all(torch.equal(converted[name], expected[name]) for name in expected)


def test_a_symbolic_link_stays_one(random_llama, tmp_path_factory) -> None:
    """Its target is replaced."""
    _, folder = random_llama()
    elsewhere = tmp_path_factory.mktemp("disk") / "big.pth"
    elsewhere.write_bytes(b"old")
    (folder / "model.pth").symlink_to(elsewhere)
    convert(folder, "bfloat16")
    assert (folder / "model.pth").is_symlink()
    assert read_checkpoint(elsewhere).args.dim == 64


def test_a_pointer_of_git_lfs_is_no_file_of_weights(random_llama) -> None:
    """Its first bytes read as a length of exabytes."""
    _, folder = random_llama()
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="model.safetensors: .*download it again"):
        convert(folder, "bfloat16")


def test_stale_temporary_files_are_deleted(random_llama) -> None:
    """Temporary files of checkpoints, older than a day; no other file whose name starts with a dot."""
    _, folder = random_llama()
    stale, fresh = ".model_int4.g32.cpu.pth.12345.tmp", ".model_int8.pth.67890.tmp"
    for name in (stale, fresh, ".notes.tmp", ".model.pth.mine.tmp"):
        (folder / name).write_bytes(b"x")
        seconds = time.time() - STALE_SECONDS + (60 if name == fresh else -60)
        os.utime(folder / name, (seconds, seconds))
    convert(folder, "bfloat16")
    assert {path.name for path in folder.glob(".*")} == {fresh, ".notes.tmp", ".model.pth.mine.tmp"}


def test_fields_that_config_json_leaves_out_have_the_defaults_of_transformers() -> None:
    config = CONFIG | {"rope_scaling": {"type": None}}
    args = model_args(config)
    assert (args.max_seq_length, args.rope_theta, args.rope_scale, args.n_kv_head) == (2048, 10000.0, 1.0, 2)


def test_unaligned_safetensors_are_read(random_llama, tmp_path: Path) -> None:
    """The format does not promise that tensors start at multiples of their item size."""
    _, folder = random_llama()
    path = folder / "model.safetensors"
    expected = {name: read().clone() for name, read in read_weights(folder).items()}
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip() + b" "
    header += b" " * (1 - len(header) % 2)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert all(torch.equal(read(), expected[name]) for name, read in read_weights(folder).items())


def test_both_spellings_of_the_config_are_one_shape(random_llama) -> None:
    scaling = {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2.0}
    _, folder = random_llama(rope_parameters=scaling)
    new = json.loads((folder / "config.json").read_text())
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype", "head_dim")}
    old |= {"rope_theta": 20000.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float32"}
    assert model_args(new) == model_args(old)
    assert model_args(new).rope_theta == 20000.0
    assert model_args(new).rope_scale == 2.0


def test_the_number_of_positions() -> None:
    """It is config.json's, as in transformers; FastChat's models have the scaled number in a field of its own."""
    scaled = CONFIG | {"rope_scaling": {"type": "linear", "factor": 4.0}, "max_position_embeddings": 4096}
    assert model_args(scaled).max_seq_length == 4096
    assert model_args(scaled | {"max_sequence_length": 16384}).max_seq_length == 16384
    llama_3 = CONFIG | {"rope_scaling": LLAMA_3_ROPE, "max_position_embeddings": 131072, "max_sequence_length": 2048}
    assert model_args(llama_3).max_seq_length == 131072
    mistral = CONFIG | {"model_type": "mistral", "max_position_embeddings": 4096, "sliding_window": 4096}
    assert model_args(mistral).max_seq_length == 4096


def test_tied_embeddings_are_stored_once(demo) -> None:
    checkpoint = read_checkpoint(demo["target"])
    model = load_model(checkpoint, "cpu", torch.bfloat16)
    assert model.output.weight.data_ptr() == model.tok_embeddings.weight.data_ptr()
    tied = checkpoint.state_dict["output.weight"]
    total = sum(tensor.nbytes for tensor in checkpoint.state_dict.values()) - tied.nbytes
    assert total < demo["target"].stat().st_size < total + 200_000


def test_loading_maps_the_file(demo) -> None:
    """Weights that need no conversion are not copied: their memory belongs to the file."""
    model = load_model(read_checkpoint(demo["target"]), "cpu", torch.bfloat16)
    address = model.layers[0].attention.wqkv.weight.data_ptr()
    ranges = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    inside = [r for r in ranges if int(r[0].split("-")[0], 16) <= address < int(r[0].split("-")[1], 16)]
    assert inside[0][-1] == str(demo["target"])


def test_the_chat_template_is_stored(random_llama) -> None:
    _, folder = random_llama()
    assert read_checkpoint(convert(folder, "bfloat16")).tokenizer.chat_template is None
    first, second = "{{ messages[0].content }}", "{{ messages[-1].content }}"
    for template in (first, [{"name": "tools", "template": "x"}, {"name": "default", "template": first}]):
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        assert read_checkpoint(convert(folder, "bfloat16")).tokenizer.chat_template == first
    (folder / "chat_template.jinja").write_text(second)
    assert read_checkpoint(convert(folder, "bfloat16")).tokenizer.chat_template == second


@pytest.mark.parametrize("whole", ["model.safetensors", "pytorch_model.bin"])
def test_a_whole_file_is_the_model_and_not_older_shards_beside_it(whole: str, random_llama, capsys) -> None:
    """With their index and without it, as after saving into a folder twice. One line says which files were read."""
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    _, folder = random_llama()
    weights = load_file(folder / "model.safetensors")
    save = save_file if whole.endswith("safetensors") else torch.save
    stem, ending = whole.rsplit(".", 1)
    old = {name: weight + 1 for name, weight in weights.items()}
    (folder / "model.safetensors").unlink()
    save(weights, folder / whole)
    shard = f"{stem}-00001-of-00001.{ending}"
    save(old, folder / shard)
    for index in (None, {"weight_map": dict.fromkeys(old, shard)}):
        if index:
            (folder / f"{whole}.index.json").write_text(json.dumps(index))
        capsys.readouterr()
        model = read_checkpoint(convert(folder, "float32")).state_dict
        assert torch.equal(model["norm.weight"], weights["model.norm.weight"].float())
        assert f"reading {folder / whole}\n" in capsys.readouterr().err


def test_a_damaged_generation_config_is_not_used(random_llama, capsys) -> None:
    """It is optional: one line, and the model of the folder without it."""
    _, folder = random_llama()
    (folder / "generation_config.json").unlink(missing_ok=True)
    expected = asdict(read_checkpoint(convert(folder, "bfloat16")).tokenizer)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2 3]}')
    capsys.readouterr()
    assert asdict(read_checkpoint(convert(folder, "bfloat16")).tokenizer) == expected
    assert "generation_config.json: JSONDecodeError" in capsys.readouterr().err


def test_a_sliding_window_is_the_context(capsys) -> None:
    """Mistral 0.1 names it, or has transformers' default of 4,096; attention within it is exact."""
    mistral = CONFIG | {"model_type": "mistral", "max_position_embeddings": 32768}
    for window, context in (({"sliding_window": 4096}, 4096), ({}, 4096), ({"sliding_window": None}, 32768)):
        assert model_args(mistral | window).max_seq_length == context
        assert ("context: 4096 of 32768 positions" in capsys.readouterr().err) == (context == 4096)


def test_each_conversion_has_an_id_of_its_own(random_llama) -> None:
    _, folder = random_llama()
    first = read_checkpoint(convert(folder, "bfloat16")).header["id"]
    assert first != read_checkpoint(convert(folder, "bfloat16")).header["id"]


def test_a_failed_write_leaves_the_old_file(random_llama) -> None:
    _, folder = random_llama()
    path = convert(folder, "bfloat16")
    before, checkpoint = path.read_bytes(), read_checkpoint(path)
    with pytest.raises(OSError, match="no space"), new_checkpoint(path, {}, {"a": torch.empty(4)}) as tensors:
        tensors["a"].fill_(1)
        raise OSError("no space left")
    assert path.read_bytes() == before
    assert checkpoint.path == path
    assert [file.name for file in folder.glob("*tmp*")] == []


OLD_CONFIG = ["dim", "n_layer", "n_head", "n_kv_head", "head_dim", "ffn_dim", "vocab_size", "norm_eps", "rope_theta"]
OLD_CONFIG += ["rope_scale", "max_seq_length", "rope_low", "rope_high", "rope_positions"]
OLD_TOKENIZER = ["added", "special", "bos", "eos", "begins", "ends", "template"]  # after proto


def old_tokenizer(ours: Tokenizer, proto: bytes, splits: list[str] | None) -> dict:
    """The tokenizer of a checkpoint's header as it was written before 2026-11-29."""
    _, *values, legacy = asdict(ours).values()
    fields = {"proto": proto} | dict(zip(OLD_TOKENIZER, values, strict=True))
    return fields | {"splits": splits, "whole_words": False, "legacy": legacy}


def control_piece(text: str) -> bytes:
    """A piece of sentencepiece of type CONTROL in protobuf: earlier versions appended one for each added token."""
    piece = bytes([0x0A, len(text)]) + text.encode() + b"\x15" + bytes(4) + b"\x18\x03"
    return bytes([0x0A, len(piece)]) + piece


def test_checkpoints_of_earlier_versions_are_read(demo) -> None:
    """With a sentencepiece tokenizer: the same shape, weights, ids and text."""
    new = read_checkpoint(demo["target"])
    content = torch.load(demo["target"], weights_only=True)
    content["config"] = dict(zip(OLD_CONFIG, content["config"].values(), strict=True))
    content["tokenizer"] = old_tokenizer(new.tokenizer, new.tokenizer.model["model_proto"], None)
    path = demo["target"].with_name("old.pth")
    torch.save(content, path)
    old = read_checkpoint(path)
    assert (old.args, old.tokenizer, old.header["id"]) == (new.args, new.tokenizer, new.header["id"])
    prompt = typed(old.tokenizer, "def read_file(path):")
    answers = [
        generated(new_engine(load_model(each, "cpu", torch.float32), 64), prompt, 10, make_params())
        for each in (old, new)
    ]
    assert prompt == typed(TOKENIZER, "def read_file(path):") and answers[0] == answers[1]


def test_the_scaled_rope_of_an_earlier_version_is_read(random_llama) -> None:
    _, folder = random_llama(rope_parameters=LLAMA_3_ROPE | {"rope_theta": 10000.0})
    path = convert(folder, "float32")
    content, args = torch.load(path, weights_only=True), read_checkpoint(path).args
    content["config"] = dict(zip(OLD_CONFIG, content["config"].values(), strict=True))
    assert content["config"]["rope_positions"] == LLAMA_3_ROPE["original_max_position_embeddings"]
    torch.save(content, path)
    assert read_checkpoint(path).args == args != ModelArgs(**asdict(args) | {"rope_low_freq_factor": 2.0**29})


def test_added_tokens_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    """Their pieces are at the end of the sentencepiece model."""
    shutil.copy(DEMO / "target" / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 2048, "<|im_end|>": 2049}))
    new = read_tokenizer(tmp_path, 2050, {2049})
    proto = new.model["model_proto"] + control_piece("<|im_start|>") + control_piece("<|im_end|>")
    old = Tokenizer.from_fields(old_tokenizer(new, proto, None))
    assert (old.vocab_size, old.eos_ids, old.bos_ids) == (2050, [2, 2049], [1])
    text = "<|im_start|>user\nimport os<|im_end|>\n"
    assert old.encode(text) == new.encode(text)
    assert typed(old, text) == typed(new, text)
    assert [old.token_bytes(token) for token in range(2050)] == [new.token_bytes(token) for token in range(2050)]


def test_a_byte_level_tokenizer_of_an_earlier_version_is_refused_in_one_line(demo, tmp_path: Path) -> None:
    """The line names the file and prepare.sh."""
    content = torch.load(demo["target"], weights_only=True)
    tokenizer = read_checkpoint(demo["target"]).tokenizer
    for splits in ([], [r"\s+"]):
        content["tokenizer"] = old_tokenizer(tokenizer, tokenizer.model["model_proto"], splits)
        torch.save(content, tmp_path / "old.pth")
        with pytest.raises(ValueError, match=r"old.pth: .*convert it again with \./scripts/prepare.sh") as caught:
            read_checkpoint(tmp_path / "old.pth")
        assert "\n" not in str(caught.value)


def test_prepare_converts_a_local_directory_from_anywhere(demo, tmp_path: Path) -> None:
    """prepare.sh DIR --precision float32, called from another directory with a relative path."""
    shutil.copytree(Path(__file__).parent / "demo" / "draft", tmp_path / "some" / "model")
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [ROOT / "scripts" / "prepare.sh", "some/model", "--precision", "float32"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert read_checkpoint(tmp_path / "some/model/model.pth").state_dict["norm.weight"].dtype == torch.float32
