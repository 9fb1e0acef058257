"""What a model itself answers."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from osft.data.records import Record
from osft.data.template_keys import with_known_roles
from osft.models.cpu_linear import fast_linear_layers

MAX_NEW_TOKENS = 24
"""Of an answer, unless it ends before."""


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    together: bool = True,
) -> list[str]:
    """The model's own answer to each record's prompt, by greedy decoding.

    together: all in one batch, filled up on the left; for models to which a mask can hide what fills a row.
    """
    prompts = [_prompt(tokenizer, record) for record in records]
    end = tokenizer.eos_token_id
    in_one = together and end is not None  # what fills a row of an answer that is over, too
    generating: Any = model  # its type is an nn.Module's, whose attributes may be tensors
    answers: list[str] = []
    for batch in [prompts] if in_one and prompts else [[prompt] for prompt in prompts]:
        width = max(map(len, batch))
        rows = [[end] * (width - len(prompt)) + prompt for prompt in batch]
        is_token = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch]
        with fast_linear_layers(model):
            written = generating.generate(
                torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(is_token, device=model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=end,
            )
        answers += [text.strip() for text in tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)]
    return answers


def _prompt(tokenizer: PreTrainedTokenizerBase, record: Record) -> list[int]:
    """The tokens that ask for the last message."""
    record = with_known_roles(tokenizer.get_chat_template(tools=list(record.tools) or None), record)
    encoded: Any = tokenizer.apply_chat_template(
        list(record.messages[:-1]),
        tools=list(record.tools) or None,
        add_generation_prompt=True,
        return_dict=True,
        **record.extra,
    )
    prompt: list[int] = encoded["input_ids"]
    return prompt
