"""Chat templates in the shapes that models have, and the byte tokenizer with one of them."""

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.conftest import byte_tokenizer
from tests.data.more_templates import MORE_SHAPES

# As Llama 3: a bos, headers of special tokens, stripped contents, one call a message as bare JSON.
LLAMA3 = """{{ bos_token }}{% for m in messages %}
{%- if m.tool_calls is defined %}
{%- set f = m.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + f.name + '", "parameters": ' }}
{{- f.arguments | tojson + '}<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' }}
{{- m.content | trim + '<|eot_id|>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

# As Qwen3: tools in the system's turn, results of tools in a user's turn, and reasoning only after the last question.
QWEN3 = """{%- if tools %}{{ '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}
{{- '<tools>' }}{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}
{%- set ns = namespace(question=-1) %}
{%- for m in messages %}{% if m.role == 'user' and not m.content.startswith('<tool_response>') %}
{%- set ns.question = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}
{%- set content = m.content %}{% set reasoning = '' %}
{%- if m.reasoning_content is string %}{% set reasoning = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.question and (loop.last or reasoning) %}
{{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}{{ content }}{% endif %}
{%- for call in m.tool_calls or [] %}{% set f = call.function or call %}
{{- '\n' if content or not loop.first else '' }}{{ '<tool_call>\n{"name": "' + f.name + '", "arguments": ' }}
{{- (f.arguments if f.arguments is string else f.arguments | tojson) + '}\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# As Mistral: no generation prompt, tools and system text before the last question, only the assistant's turns closed.
MISTRAL = """{{ bos_token }}{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}
{%- set ns = namespace(last=0, turn=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if ns.turn % 2 %}{{ raise_exception('roles must alternate user/assistant') }}{% endif %}
{%- set ns.turn = ns.turn + 1 %}
{%- if loop.index0 == ns.last and tools %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST]' + (system if loop.index0 == ns.last else '') + m.content + '[/INST]' }}
{%- elif m.tool_calls is defined %}
{{- '[TOOL_CALLS][' }}{% for c in m.tool_calls %}{{ c.function | tojson }}{{ ', ' if not loop.last }}{% endfor %}
{{- ']' + eos_token }}
{%- elif m.role == 'assistant' %}{% set ns.turn = ns.turn + 1 %}{{ ' ' + m.content | trim + eos_token }}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + {'content': m.content} | tojson + '[/TOOL_RESULTS]' }}
{%- endif %}{% endfor %}"""

# As Gemma: the assistant is called model, and there is no system turn.
GEMMA = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

# As Llama 2: the system's text within the first question, and a space before the special token that closes.
LLAMA2 = """{% for m in messages %}
{%- if m.role == 'user' %}
{%- set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' if messages[0].role == 'system' else '' %}
{{- bos_token + '[INST] ' + (system if loop.index0 <= 1 else '') + m.content | trim + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"""

# As DeepSeek-R1: generation begins within the reasoning, which is cut out of every turn; turns of users stay open.
DEEPSEEK = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}{{ '<|User|>' + m.content }}
{%- else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"""

# template, eos, bos, special tokens that the tokenizer has no name for, other added tokens
SHAPES = {
    "llama3": (LLAMA3, "<|end_of_text|>", "<|begin|>", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], []),
    "qwen3": (QWEN3, "<|im_end|>", None, ["<|im_start|>"], ["<think>", "</think>", "<tool_call>", "</tool_call>"]),
    "mistral": (
        MISTRAL,
        "</s>",
        "<s>",
        [f"[{slash}{name}]" for name in ("INST", "AVAILABLE_TOOLS", "TOOL_RESULTS") for slash in ("", "/")]
        + ["[TOOL_CALLS]"],
        [],
    ),
    "gemma": (GEMMA, "<eos>", "<bos>", ["<start_of_turn>", "<end_of_turn>"], []),
    "llama2": (LLAMA2, "</s>", "<s>", [], []),
    "deepseek": (DEEPSEEK, "<|end|>", "<|begin|>", ["<|User|>", "<|Assistant|>"], ["<think>", "</think>"]),
    **MORE_SHAPES,
}


def shaped_tokenizer(shape: str) -> PreTrainedTokenizerFast:
    """The byte tokenizer with the template and the added tokens of a model family."""
    template, eos, bos, special, plain = SHAPES[shape]
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": eos} | ({"bos_token": bos} if bos else {}))
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special], special_tokens=True)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    tokenizer.chat_template = template
    return tokenizer
