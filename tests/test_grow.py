"""A grown model generates the text of the small one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import assert_close, generated, make_params, new_engine, run_cli

from benchmarks.grow import grow, shape_args
from checkpoint import load_model, read_checkpoint
from model import Transformer

SMALL = {"n_layer": 5, "dim": 512, "ffn_dim": 1376}  # wider, and one more layer: this is float32 on two cores
SMALLER = {  # the heads of the shapes
    "heads of 64, no groups": replace(shape_args("160m", 2048), **SMALL),
    "larger groups": replace(shape_args("1.1b", 2048), **SMALL),
    "heads of 128": replace(shape_args("7b", 2048), **SMALL),
    "smaller groups": replace(shape_args("68m", 2048), **SMALL | {"n_head": 10, "n_kv_head": 10, "head_dim": 32}),
}
PROMPT = list(range(5, 60))


def load(path: Path) -> Transformer:
    return load_model(read_checkpoint(path), "cpu", torch.float32)


def logits(model: Transformer) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([PROMPT]), torch.arange(len(PROMPT)), model.make_cache(len(PROMPT)))


def assert_same_text(grown: Transformer, small: Transformer) -> None:
    """Assert close logits and equal tokens, greedy and sampled."""
    assert_close(logits(grown), logits(small))
    for temperature in (0.0, 0.8):
        params = make_params(1, temperature)
        expected = generated(new_engine(small), PROMPT, 30, params)
        assert generated(new_engine(grown), PROMPT, 30, params) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLER)
def test_the_grown_target_keeps_its_text(name: str, demo: dict[str, Path], target: Transformer, tmp_path: Path) -> None:
    grow(read_checkpoint(demo["target"]), SMALLER[name], tmp_path / "grown.pth", torch.float32)
    grown = load(tmp_path / "grown.pth")
    same = ("dim", "n_layer", "n_head", "n_kv_head", "head_dim", "ffn_dim", "max_seq_length")
    assert [getattr(grown.args, field) for field in same] == [getattr(SMALLER[name], field) for field in same]
    assert_same_text(grown, target)


def test_the_grown_draft_keeps_its_text(demo: dict[str, Path], tmp_path: Path) -> None:
    grow(read_checkpoint(demo["draft"]), shape_args("68m", 2048), tmp_path / "grown.pth", torch.float32)
    assert_same_text(load(tmp_path / "grown.pth"), load(demo["draft"]))


@pytest.mark.slow
def test_the_command_line_makes_the_folder_and_writes_bfloat16(demo: dict[str, Path], tmp_path: Path) -> None:
    """Weights are rounded once more, so logits are only near."""
    path = tmp_path / "new" / "grown.pth"
    run_cli("-m", "benchmarks.grow", "--checkpoint_path", demo["draft"], "--shape", "68m", "--out", path)
    grown = read_checkpoint(path)
    assert grown.args.dim == 768
    assert {tensor.dtype for tensor in grown.state_dict.values()} == {torch.bfloat16}
    ours, theirs = logits(load(path)), logits(load(demo["draft"]))
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"dim": 128}, "dim 128 is less than the checkpoint's"),
        ({"ffn_dim": 255}, "ffn_dim 255 is less than the checkpoint's"),
        ({"head_dim": 16}, "head_dim 16 is less than the checkpoint's"),
        ({"head_dim": 48}, "head_dim must be a multiple"),
        ({"vocab_size": 4096}, "the vocabulary the same"),
        ({"n_head": 2, "n_kv_head": 2}, "2 heads and 2 KV heads are too few"),
    ],
    ids=str,
)
def test_a_refused_growth_leaves_no_file(fields: dict, reason: str, demo: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        grow(read_checkpoint(demo["draft"]), replace(shape_args("68m", 2048), **fields), tmp_path / "no", torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_checkpoint_is_refused(demo: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not quantized"):
        grow(read_checkpoint(demo["int8"]), shape_args("160m", 2048), tmp_path / "no.pth", torch.float32)
    assert list(tmp_path.iterdir()) == []
