"""Small random models with weights of every layout, and text for them."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

from osft.data.chat import Sample

VOCABULARY = 256
_COMMON = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "llama": lambda: LlamaConfig(**_COMMON, hidden_size=256, intermediate_size=512),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=128, n_layer=2, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=1
    ),
    "mixtral": lambda: MixtralConfig(
        **_COMMON, hidden_size=128, intermediate_size=192, num_local_experts=4, num_experts_per_tok=2
    ),
}
"""Square, tall and wide weights; weights stored (in, out); stacked experts."""


def build(family: str) -> nn.Module:
    """The model on the CPU, in float32."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32).eval()


def texts(count: int = 12, seed: int = 1) -> list[Sample]:
    """Samples of 20 to 60 tokens that can be learned: each counts on by a step of its own."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        first, step, length = (
            int(torch.randint(low, high, (), generator=generator)) for low, high in ((0, VOCABULARY), (1, 4), (20, 61))
        )
        row = [(first + step * i) % VOCABULARY for i in range(length)]
        samples.append(Sample(row, row))
    return samples
