"""The base model: SmolLM2-135M-Instruct, dequantised from Q4_1, then healed.

Any training first repairs what the quantization broke, and that hides forgetting. So the model is tuned on web text
before anything else, all parameters for a few steps, and called healed.
"""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.texts import blocks_of_tokens
from osft.data import examples
from osft.storage.atomic import atomic_path
from osft.storage.hashes import folder_sha256

MODEL = "example:smollm2-135m-instruct"
STEPS, LEARNING_RATE, BLOCKS_PER_STEP = 29, 1e-4, 2


def healed_model(
    cache: Path, passages: list[str], block_tokens: int, device: str, progress: Callable[[str], None]
) -> Path:
    """The folder of the healed model in float32, made on first use below `cache`; passages: web text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = Path(examples.resolve(MODEL, cache))
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    blocks = blocks_of_tokens(tokenizer, passages, STEPS * BLOCKS_PER_STEP, block_tokens)
    recipe = [folder_sha256(source), blocks.tolist(), LEARNING_RATE, BLOCKS_PER_STEP]
    folder = cache / f"healed-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]}"
    if not folder.is_dir():
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        heal(model.to(device), blocks.to(device), progress)
        with atomic_path(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    return folder


def heal(model: Any, blocks: torch.Tensor, progress: Callable[[str], None]) -> None:
    """Full fine-tuning on (blocks, tokens) of text, by AdamW with a cosine schedule, in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    steps = blocks.split(BLOCKS_PER_STEP)
    for step, batch in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / len(steps)))
        optimizer.zero_grad()
        total = 0.0
        for block in batch:
            logits = model(block[None], use_cache=False).logits[0]
            loss = F.cross_entropy(logits[:-1], block[1:]) / len(batch)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress(f"healing, step {step + 1} of {len(steps)}: loss {total:.3f}")
