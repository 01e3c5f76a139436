"""A grown model says what the small one says."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import DEMO, assert_close, generated, make_sampling, new_engine

from model import Transformer
from quantize import load_model, read_checkpoint
from tests.grow import SHAPES, grow, shape_args

SMALLER = {  # the shapes' heads and widths, in fewer layers: this is float32 on two cores
    "heads of 64, no groups": replace(shape_args("160m", 2048), n_layer=5),
    "larger groups": replace(shape_args("1.1b", 2048), n_layer=5),
    "heads of 128": replace(shape_args("7b", 2048), n_layer=4, dim=1024, ffn_dim=1376),
    "smaller groups": replace(shape_args("68m", 2048), n_layer=4, n_head=10, n_kv_head=10, head_dim=32),
}


@pytest.mark.parametrize("name", SMALLER)
def test_the_grown_model_gives_the_demos_text(
    name: str, demo: dict[str, Path], target: Transformer, tmp_path: Path
) -> None:
    """Float32: logits alike, and the same tokens, greedy and sampled."""
    grow(read_checkpoint(demo["target"]), SMALLER[name], tmp_path / "grown.pth", torch.float32)
    grown = load_model(read_checkpoint(tmp_path / "grown.pth"), "cpu", torch.float32)
    assert (grown.args.dim, grown.args.n_layer) == (SMALLER[name].dim, SMALLER[name].n_layer)
    prompt, positions = list(range(5, 60)), torch.arange(55)
    with torch.inference_mode():
        theirs = target(torch.tensor([prompt]), positions, target.make_cache(55))
        assert_close(grown(torch.tensor([prompt]), positions, grown.make_cache(55)), theirs)
    for temperature in (0.0, 0.8):
        sampling = make_sampling(1, temperature)
        expected = generated(new_engine(target), prompt, 50, sampling)
        assert generated(new_engine(grown), prompt, 50, sampling) == expected


def test_the_draft_grows_too_and_what_does_not_fit_is_refused(demo: dict[str, Path], tmp_path: Path) -> None:
    draft = read_checkpoint(demo["draft"])
    grow(draft, shape_args("68m", 2048), tmp_path / "grown.pth", torch.bfloat16)
    assert read_checkpoint(tmp_path / "grown.pth").args.n_layer == SHAPES["68m"][0]
    for field, value in (("dim", 128), ("head_dim", 48), ("vocab_size", 4096), ("n_kv_head", 2)):
        with pytest.raises(ValueError, match="head_dim|less|few"):
            grow(draft, replace(shape_args("68m", 2048), **{field: value}), tmp_path / "no.pth", torch.float32)
    assert not (tmp_path / "no.pth").exists()
    assert DEMO.is_dir()
