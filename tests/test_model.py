"""The forward pass against transformers, and the properties of a cache that the caller owns."""

import dataclasses

import pytest
import torch
from conftest import assert_close, generated, make_params, new_engine

from checkpoint import load_model, read_checkpoint
from model import ModelArgs, rope_frequencies
from scripts.convert_hf_checkpoint import check_args, convert

LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
CONFIGS = {
    "multi_head": {"num_key_value_heads": 4},
    "grouped_query": {"num_key_value_heads": 2},
    "multi_query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "eps_1e-6": {"rms_norm_eps": 1e-6},
    "eps_1e-5": {"rms_norm_eps": 1e-5},
    "own_head_dim": {"head_dim": 24},
    "theta_500000": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "linear_scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama3_scaling": {"head_dim": 64, "rope_parameters": LLAMA_3 | {"original_max_position_embeddings": 32}},
    "llama3_scaling_within": {"head_dim": 64, "rope_parameters": LLAMA_3 | {"original_max_position_embeddings": 100}},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral_window_that_does_not_bind": {"model_type": "mistral", "sliding_window": 128, "head_dim": 24},
}


def split_logits(model, tokens: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Logits of `tokens` [B, S], run in consecutive chunks of the given sizes on a fresh cache."""
    cache, start, logits = model.make_cache(tokens.shape[1], tokens.shape[0]), 0, []
    for size in sizes:
        logits.append(model(tokens[:, start : start + size], torch.arange(start, start + size), cache))
        start += size
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_greedy_text_equal_transformers(random_llama, name: str) -> None:
    reference, folder = random_llama(**CONFIGS[name])
    model = load_model(read_checkpoint(convert(folder, "float32")), "cpu", torch.float32)
    tokens = torch.randint(3, 2048, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert_close(split_logits(model, tokens, [40]), reference(tokens).logits)
        theirs = reference.generate(tokens[:1], max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generated(new_engine(model), tokens[0].tolist(), 30, make_params()) == theirs[0, 40:].tolist()


ODD = {  # sizes at and beyond the limits of the kernels
    "heads of 1,024": {"head_dim": 1024, "num_attention_heads": 2, "num_key_value_heads": 1},
    "heads of 1,026": {"head_dim": 1026, "num_attention_heads": 2, "num_key_value_heads": 1},
    "heads of 2,048": {"head_dim": 2048, "num_attention_heads": 1, "num_key_value_heads": 1},
    "heads of 2": {"head_dim": 2},
    "channels that 32 does not divide": {"hidden_size": 72, "intermediate_size": 100, "head_dim": 18},
    "one layer, one channel of the feed-forward": {"num_hidden_layers": 1, "intermediate_size": 1},
    "one position": {"max_position_embeddings": 1},
}


@pytest.mark.parametrize("name", ODD)
def test_sizes_that_the_kernels_do_not_take_run_all_the_same(random_llama, name: str) -> None:
    """Logits in bfloat16, of 1 and 12 rows, near transformers' float32; one position is used to its end."""
    reference, folder = random_llama(**ODD[name])
    model = load_model(read_checkpoint(convert(folder, "bfloat16")), "cpu", torch.bfloat16)
    positions = min(12, model.args.max_seq_length)
    tokens = torch.randint(3, 2048, (1, positions), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs = reference(tokens).logits
        for sizes in ([positions], [1] * positions):
            error = (split_logits(model, tokens, sizes) - theirs).abs().max()
            assert error < 0.06 * theirs.abs().max()
    count = len(generated(new_engine(model), tokens[0].tolist(), 3, make_params()))
    assert count == min(3, model.args.max_seq_length - positions + 1)


def test_frequencies_of_llama_3_are_transformers() -> None:
    """High frequencies unchanged, low ones divided, between them a smooth transition."""
    from transformers import LlamaConfig  # noqa: PLC0415
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: PLC0415

    parameters = LLAMA_3 | {"original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=4096, num_attention_heads=32, head_dim=128, rope_parameters=parameters)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    fields = {"dim": 4096, "n_layer": 1, "n_head": 32, "n_kv_head": 8, "head_dim": 128, "ffn_dim": 1, "vocab_size": 1}
    fields |= {"norm_eps": 1e-5, "rope_theta": 500000.0, "max_seq_length": 131072}
    plain = rope_frequencies(ModelArgs(**fields, rope_scale=1.0))
    scaling = {"rope_scale": 8.0, "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0}
    scaling["rope_original_max_position_embeddings"] = 8192
    ours = rope_frequencies(ModelArgs(**fields, **scaling))
    assert (ours / theirs - 1).abs().max() < 1e-6
    assert torch.equal(ours[:16], plain[:16]) and torch.equal(ours[-16:], plain[-16:] / 8)
    assert ((ours < plain) & (ours > plain / 8)).sum() > 3


@torch.inference_mode()
def test_any_split_of_the_prompt_gives_the_same_logits(target) -> None:
    tokens = torch.randint(3, 2048, (1, 60), generator=torch.Generator().manual_seed(2))
    whole = split_logits(target, tokens, [60])
    for sizes in ([1] * 60, [59, 1], [1, 59], [7, 20, 33], [16, 16, 16, 12]):
        split = split_logits(target, tokens, sizes)
        assert_close(split, whole)
        assert torch.equal(split.argmax(-1), whole.argmax(-1))


@torch.inference_mode()
def test_last_only_is_the_last_row(target) -> None:
    tokens = torch.randint(3, 2048, (1, 20), generator=torch.Generator().manual_seed(3))
    whole = target(tokens, torch.arange(20), target.make_cache(32))
    last = target(tokens, torch.arange(20), target.make_cache(32), last_only=True)
    assert_close(last, whole[:, -1:])


@torch.inference_mode()
def test_two_conversations_on_one_model_do_not_disturb_each_other(target) -> None:
    first, second = torch.randint(3, 2048, (2, 1, 30), generator=torch.Generator().manual_seed(4))
    alone = split_logits(target, first, [30])
    caches = target.make_cache(64), target.make_cache(64)
    for start in range(0, 30, 10):
        pos = torch.arange(start, start + 10)
        mixed = target(first[:, start : start + 10], pos, caches[0])
        target(second[:, start : start + 10], pos, caches[1])
        assert_close(mixed, alone[:, start : start + 10])


@torch.inference_mode()
def test_cached_values_after_the_position_do_not_matter(target) -> None:
    tokens, pos = torch.randint(3, 2048, (1, 20), generator=torch.Generator().manual_seed(5)), torch.arange(20)
    clean, dirty = target.make_cache(32), target.make_cache(700)
    for layer in dirty:
        layer.fill_(float("nan"))
    assert torch.equal(target(tokens, pos, clean), target(tokens, pos, dirty))


def test_args_that_are_no_shape_are_refused(target) -> None:
    """Errors of the converter that name the field."""
    check_args(target.args)
    for change in (
        {"dim": 0},
        {"dim": "256"},
        {"n_layer": True},
        {"norm_eps": float("nan")},
        {"n_kv_head": 3},
        {"head_dim": 31},
    ):
        with pytest.raises(ValueError, match=next(iter(change))):
            check_args(dataclasses.replace(target.args, **change))
