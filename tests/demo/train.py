"""Train the two bundled checkpoints (`target`, `draft`) and their tokenizer on the standard library's own text.

    python tests/demo/train.py            # about an hour on 2 cores; writes tests/demo/{target,draft}

The text is what every machine with Python has: the language reference in `pydoc_data.topics`, docstrings and sources.
Every 16th document is held out, by a hash of its name. The draft learns from the target's distribution
(distillation), because a draft is good where it agrees with its target.
"""

import argparse
import ast
import hashlib
import io
import math
import shutil
import sysconfig
import time
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
CONTEXT, VOCAB = 1024, 2048
SKIP = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "turtledemo", "__pycache__"}


def documents() -> list[tuple[str, str]]:
    """(name, text) of the corpus: manual topics, docstrings, sources of the standard library."""
    from pydoc_data.topics import topics  # noqa: PLC0415

    found = [(f"topic {name}", text) for name, text in topics.items()]
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if SKIP & set(path.relative_to(root).parts) or path.name.startswith("_sysconfigdata"):
            continue
        name, source = str(path.relative_to(root)), path.read_text(errors="ignore")
        found.append((name, source))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
                text = ast.get_docstring(node) or ""
                if len(text) > 120:
                    found.append((f"{name} {getattr(node, 'name', '')} doc", text))
    return [(name, text.strip() + "\n") for name, text in found]


def is_held_out(name: str) -> bool:
    """Whether a document is kept from training; a docstring goes with its file."""
    words = name.split()[: 2 if name.startswith("topic") else 1]
    return hashlib.sha256(" ".join(words).encode()).digest()[0] < 16


def held_out_text(characters: int) -> str:
    """The first `characters` of the held-out documents, manual topics first: what tests measure perplexity on."""
    return "\n".join(text for name, text in documents() if is_held_out(name))[:characters]


def train_tokenizer(path: Path) -> None:
    """A byte-fallback BPE of VOCAB pieces, set up as Llama's is."""
    text = [line for name, body in documents() if not is_held_out(name) for line in body.splitlines() if line.strip()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text[::3]), model_writer=model, model_type="bpe", vocab_size=VOCAB, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, character_coverage=0.9999, num_threads=1, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())


def streams(tokenizer: sentencepiece.SentencePieceProcessor) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out token streams: every document between its own BOS and EOS, in an order drawn by name."""
    train, held_out = [], []
    for name, text in sorted(documents(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest()):
        ids = [tokenizer.bos_id(), *tokenizer.encode(text), tokenizer.eos_id()]
        (held_out if is_held_out(name) else train).extend(ids)
    return torch.tensor(train), torch.tensor(held_out)


def build(n_layer: int, ffn: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=ffn, num_hidden_layers=n_layer, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(tokens, use_cache=False).logits.float()


@torch.no_grad()
def perplexity(model: torch.nn.Module, stream: torch.Tensor) -> float:
    rows = stream[: len(stream) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)[:64]
    losses = [F.cross_entropy(logits_of(model, row[None, :-1])[0], row[1:]).item() for row in rows]
    return math.exp(sum(losses) / len(losses))


@torch.no_grad()
def agreement(target: torch.nn.Module, draft: torch.nn.Module, stream: torch.Tensor) -> float:
    """Share of held-out positions at which both models' most likely tokens are the same."""
    rows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, 1, CONTEXT)[:64]
    same = [logits_of(target, row).argmax(-1) == logits_of(draft, row).argmax(-1) for row in rows]
    return torch.stack(same).float().mean().item()


def fit(model: torch.nn.Module, stream: torch.Tensor, steps: int, teacher: torch.nn.Module | None) -> None:
    """Muon on matrices, AdamW on the rest; 8,192 tokens a step, short rows first, whole contexts in the last fifth."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.02, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.004, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    base = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    generator, start = torch.Generator().manual_seed(0), time.time()
    for step in range(steps):
        length = 256 if step < 0.8 * steps else CONTEXT
        factor = min(1.0, (step + 1) / 50, (steps - step) / (0.6 * steps))
        for optimizer, lr in zip(optimizers, base, strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
        starts = torch.randint(len(stream) - length - 1, (8192 // length,), generator=generator)
        batch = torch.stack([stream[i : i + length + 1] for i in starts])
        logits = logits_of(model, batch[:, :-1]).flatten(0, 1)
        if teacher is None:
            loss = F.cross_entropy(logits, batch[:, 1:].flatten())
        else:
            with torch.no_grad():
                wanted = logits_of(teacher, batch[:, :-1]).flatten(0, 1).log_softmax(-1)
            loss = F.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="batchmean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step} loss {loss.item():.3f} {time.time() - start:.0f} s", flush=True)


def save(model: torch.nn.Module, folder: Path, tokenizer: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    shutil.copyfile(tokenizer, folder / "tokenizer.model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1800, help="steps of 8,192 tokens for the target")
    parser.add_argument("--draft_steps", type=int, default=800, help="the same for the draft")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer_path = args.out / "tokenizer.model"
    train_tokenizer(tokenizer_path)
    train, held_out = streams(sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path)))
    print(f"{len(train)} training tokens, {len(held_out)} held out", flush=True)
    target, draft = build(4, 768), build(1, 256)
    fit(target, train, args.steps, None)
    save(target, args.out / "target", tokenizer_path)
    print(f"target: held-out perplexity {perplexity(target, held_out):.3f}", flush=True)
    fit(draft, train, args.draft_steps, target)
    save(draft, args.out / "draft", tokenizer_path)
    print(f"draft: held-out perplexity {perplexity(draft, held_out):.3f}")
    print(f"argmax of both agrees on {agreement(target, draft, held_out):.3f} of held-out tokens")
    tokenizer_path.unlink()


if __name__ == "__main__":
    main()
