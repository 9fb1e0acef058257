"""More shapes of chat templates, each with the special tokens that its family has."""

# As Phi-3: a line break after each token, and the end of the text instead of a prompt.
PHI3 = """{% for m in messages %}{% if m.role == 'system' %}{{ '<|system|>\n' + m.content + '<|end|>\n' }}
{%- elif m.role == 'user' %}{{ '<|user|>\n' + m.content + '<|end|>\n' }}
{%- elif m.role == 'tool' %}{{ '<|tool|>\n' + m.content + '<|end|>\n' }}
{%- elif m.role == 'assistant' %}{{ '<|assistant|>\n' + m.content }}
{%- for call in m.tool_calls or [] %}
{{- '<|call|>' + call.function.name + call.function.arguments | tojson }}{% endfor %}
{{- '<|end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

# As Granite 3: a system's turn that the template writes, the role between tokens, the end of the text closes turns.
GRANITE = """{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set system = 'You are Granite.' %}{% set rest = messages %}{% endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\n' }}
{%- if tools %}{{ '<|start_of_role|>tools<|end_of_role|>' + tools | tojson + '<|end_of_text|>\n' }}{% endif %}
{%- for m in rest %}
{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}
{%- if loop.last and add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}
{%- endfor %}"""

# As InstructLab's Granite 7B: roles as tokens, no prompt but a header, and text to be learned whole.
INSTRUCTLAB = """{% for m in messages %}
{%- if m.role == 'pretraining' %}{{ '<|pretrain|>' + m.content + '<|endoftext|>' + '<|/pretrain|>' }}
{%- elif m.role == 'system' %}{{ '<|system|>\n' + m.content + '\n' }}
{%- elif m.role == 'user' %}{{ '<|user|>\n' + m.content + '\n' }}
{%- elif m.role == 'assistant' %}
{{- '<|assistant|>\n' + m.content + '<|endoftext|>' + ('' if loop.last else '\n') }}{% endif %}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"""

# As Zephyr: the end of the text closes every turn, the next one begins in a new line.
ZEPHYR = """{% for m in messages %}
{{- '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{% endfor %}"""

# As Tulu and OLMo 2: roles are plain text, the last turn is closed in another way.
OLMO2 = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'assistant' %}{{ '<|assistant|>\n' + m.content + eos_token + ('' if loop.last else '\n') }}
{%- else %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endif %}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"""

# As Command R: the assistant is the chatbot, contents are stripped, and everyone's turn has the same tokens.
COMMAND_R = """{{ bos_token }}{% set roles = {'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM'} %}
{%- for m in messages %}
{{- '<|START_OF_TURN_TOKEN|><|' + roles[m.role] + '_TOKEN|>' + m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""

# As InternLM 2.
INTERNLM = """{{ bos_token }}{% for m in messages %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# As Gemma 3: the system's text at the head of the first question.
GEMMA3 = """{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}
{%- set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}
{%- for m in rest %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '') }}
{{- m.content | trim + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

# As Mistral 7 (tekken): a system's turn of its own, no white space at all.
MISTRAL7 = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}
{%- elif m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}
{%- elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}"""

# As DeepSeek V3: system texts are joined at the head, the assistant's tag follows the question, calls have tokens.
DEEPSEEK3 = """{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}
{%- set ns.system = ns.system + m.content %}{% endif %}{% endfor %}{{ bos_token + ns.system }}
{%- for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}
{%- elif m.role == 'tool' %}{{ '<|tool_output|>' + m.content + '<|tool_output_end|>' }}
{%- elif m.role == 'assistant' %}
{{- ('<|Assistant|>' if messages[loop.index0 - 1].role != 'tool' else '') + m.content }}
{%- for call in m.tool_calls or [] %}{{ '<|calls|>' if loop.first }}
{{- '<|call|>function<|sep|>' + call.function.name + '\n' + call.function.arguments | tojson + '<|call_end|>' }}
{{- '<|calls_end|>' if loop.last }}{% endfor %}{{ eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<|Assistant|>' }}{% endif %}"""

# As SmolLM 3: the markers enclose the header and the line break after the turn, and thinking is off by default.
SMOLLM3 = """{% set think = enable_thinking | default(false) %}
{{- '<|im_start|>system\n' + (messages[0].content if messages[0].role == 'system' else 'Help.') + '<|im_end|>\n' }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}{% generation %}
{%- if think %}{{ '<|im_start|>assistant\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}{% endif %}
{%- endgeneration %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' if think else '<|im_start|>assistant\n<think>\n\n</think>\n' }}{% endif %}"""

# As Vicuna: no special token but the end of the text, and a prompt that ends without white space.
VICUNA = """{{ messages[0].content + ' ' if messages[0].role == 'system' }}
{%- for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}
{%- elif m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

# As Alpaca's, nothing but words: no token closes a turn.
WORDS = """{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}
{%- else %}{{ '### ' + ('Response' if m.role == 'assistant' else 'Instruction') + ':\n' + m.content + '\n\n' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"""

# As GPT-OSS (Harmony): channels, reasoning only in the last turn, another token that closes it, and the name of the
# function before its result.
HARMONY = """{% set ns = namespace(name='') %}{% for m in messages %}{% if m.tool_calls %}
{%- set f = m.tool_calls[0].function %}{% set ns.name = f.name %}
{%- if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
{{- '<|start|>assistant<|channel|>commentary to=functions.' + f.name + ' json<|message|>' }}
{{- f.arguments | tojson + '<|call|>' }}
{%- elif m.role == 'tool' %}
{{- '<|start|>functions.' + ns.name + ' to=assistant<|channel|>commentary<|message|>' + m.content + '<|end|>' }}
{%- elif m.role == 'assistant' %}
{%- if loop.last and m.thinking %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
{%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

# As GLM 4: the role is a token, and nothing closes a turn but the next one.
GLM4 = """{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

# As Nemotron: a line break before the token that closes a turn.
NEMOTRON = """{{ '<extra_id_0>System\n' + (messages[0].content if messages[0].role == 'system' else '') + '\n\n' }}
{%- for m in messages %}{% if m.role == 'user' %}{{ '<extra_id_1>User\n' + m.content + '\n' }}
{%- elif m.role == 'assistant' %}{{ '<extra_id_1>Assistant\n' + m.content.strip() + '\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<extra_id_1>Assistant\n' }}{% endif %}"""

# As LFM 2 with markers that leave out the token that closes the turn.
CONTENT_MARKED = """{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}
{{- '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

IM = ["<|im_start|>"]
# template, eos, bos, special tokens that the tokenizer has no name for, other added tokens
MORE_SHAPES = {
    "phi3": (
        PHI3,
        "<|endoftext|>",
        None,
        ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|call|>", "<|end|>"],
        [],
    ),
    "granite": (GRANITE, "<|end_of_text|>", None, ["<|start_of_role|>", "<|end_of_role|>"], []),
    "instructlab": (
        INSTRUCTLAB,
        "<|endoftext|>",
        None,
        ["<|system|>", "<|user|>", "<|assistant|>", "<|pretrain|>", "<|/pretrain|>"],
        [],
    ),
    "zephyr": (ZEPHYR, "</s>", "<s>", [], []),
    "olmo2": (OLMO2, "<|endoftext|>", "<|endoftext|>", [], []),
    "command-r": (
        COMMAND_R,
        "<|END_OF_TURN_TOKEN|>",
        "<BOS_TOKEN>",
        ["<|START_OF_TURN_TOKEN|>", *(f"<|{role}_TOKEN|>" for role in ("USER", "CHATBOT", "SYSTEM"))],
        [],
    ),
    "internlm": (INTERNLM, "<|im_end|>", "<s>", IM, []),
    "gemma3": (GEMMA3, "<eos>", "<bos>", ["<start_of_turn>", "<end_of_turn>"], []),
    "mistral7": (
        MISTRAL7,
        "</s>",
        "<s>",
        [f"[{slash}{name}]" for name in ("INST", "SYSTEM_PROMPT") for slash in ("", "/")],
        [],
    ),
    "deepseek3": (
        DEEPSEEK3,
        "<|end|>",
        "<|begin|>",
        [
            *("<|User|>", "<|Assistant|>", "<|tool_output|>", "<|tool_output_end|>"),
            *("<|calls|>", "<|calls_end|>", "<|call|>", "<|call_end|>", "<|sep|>"),
        ],
        [],
    ),
    "smollm3": (SMOLLM3, "<|im_end|>", None, IM, ["<think>", "</think>"]),
    "vicuna": (VICUNA, "</s>", "<s>", [], []),
    "words": (WORDS, "</s>", "<s>", [], []),
    "harmony": (HARMONY, "<|return|>", None, ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>"], []),
    "glm4": (GLM4, "<|endoftext|>", None, ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"], []),
    "nemotron": (NEMOTRON, "</s>", "<s>", ["<extra_id_0>", "<extra_id_1>"], []),
    "content marked": (CONTENT_MARKED, "<|im_end|>", "<s>", IM, []),
}
