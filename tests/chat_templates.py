"""Chat templates in the styles of released models, and conversations for them; all written for these tests."""

# ruff: noqa: E501 (templates as released ones are written, on long lines)

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from smollm_jax.tokenizer.special_tokens import byte_symbols

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]"]
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # added, but not special

CHATML = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
TEMPLATES = {
    "ChatML": f"{{% for m in messages %}}{CHATML}{{% endfor %}}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "ChatML, joined": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "tools and a date": """{{- bos_token }}
{%- if not date is defined %}{% set date = strftime_now('%d %b %Y') if strftime_now is defined else 'never' %}{% endif %}
<|im_start|>system
Today is {{ date }}.
{%- if tools is not none %}
    {%- for t in tools %}

{{ t | tojson(indent=4) }}
    {%- endfor %}
{%- endif %}<|im_end|>
{%- for m in messages %}
    {%- if not (m.role == 'tool' or 'tool_calls' in m) %}
        {{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content | trim ~ '<|im_end|>' }}
    {%- elif 'tool_calls' in m %}
        {%- if m.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{% endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|im_start|>assistant\n{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}}<|im_end|>
    {%- else %}
        {{- '<|im_start|>tool\n' }}
        {%- if m.content is mapping or m.content is iterable %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}
        {{- '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "alternating": """{%- set loop_messages = messages %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}{% set loop_messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for m in loop_messages %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant must take turns') }}
    {%- endif %}
    {%- if m['role'] == 'user' %}
        {{- '[INST] ' + (system + '\n\n' if loop.first and system is defined else '') + m['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + m['content'].strip() + eos_token }}
    {%- endif %}
{%- endfor %}""",
    "thoughts cut from the history": """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if m.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if m.reasoning_content is string %}
            {%- set thought = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last and thought %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}
        {{- content }}
        {%- for call in m.tool_calls or [] %}
            {{- '\n<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}""",
    "turns by name": """{% for m in messages %}
{% if m['role'] == 'user' %}
{{ '<|user|>\n' + m['content'] + eos_token }}
{% elif m['role'] == 'assistant' %}
{{ '<|assistant|>\n' + m['content'] + eos_token }}
{% else %}
{{ '<|system|>\n' + m['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "no system": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}
{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{ '<|im_start|>' + role + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}
{% if add_generation_prompt %}{{'<|im_start|>model\n'}}{% endif %}""",
    "parts": """{%- for m in messages -%}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}
{%- for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% elif 'image' in part %}<image>{% endif %}{% endfor %}
{%- endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "documents": """{% if documents is defined and documents is not none %}{% for d in documents %}[{{ loop.index }}] {{ d.title }}: {{ d.text }}
{% endfor %}{% endif %}{% for m in messages %}{{ m.role | upper }}: {{ m.get('content', '-') }}{% endfor %}""",
    "loops that stop": """{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% if loop.index > 3 %}{% break %}{% endif %}
{{ loop.index }}/{{ loop.length }} {{ m.content }}{% if not loop.last %}|{% endif %}{% endfor %}""",
    "generation": """{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['role']=='assistant' %}{% generation %}{% set x = 1 %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ x }}{% else %}{{ m['content'] }}<|im_end|>{% endif %}
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "every variable": "{{ [bos_token, eos_token, unk_token, pad_token, image_token, sep_token, mask_token, tools, documents, "
    "add_generation_prompt, additional_special_tokens, extra_special_tokens, chat_template] }}{{ messages }}",
    "JSON of everything": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ tools | tojson(sort_keys=true) }}"
    "{{ messages | tojson(ensure_ascii=true) }}{{ documents | tojson(separators=(',', ':')) }}",
    "macros": """{%- macro turn(role, text) -%}<|im_start|>{{ role }}: {{ caller() if caller else text }}<|im_end|>{%- endmacro -%}
{% for m in messages %}{{ turn(m.role, m.content) }}{% endfor %}{{ dict(a=1, **{'b': 2}) }}{{ dict.fromkeys(['k'], 0) }}
{%- set ns = namespace(n=0, names=[]) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}""",
    "what a sandbox forbids": "{{ messages.append(1) }}",
    "what no template has": "{{ ''.__class__.__mro__ }}",
    "a namespace of secrets": "{% set ns = namespace(_x=1) %}{{ ns._x }}",
    "an end that is a line break": "{% for m in messages %}{{ m.content }}{% endfor %}\n",
}

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "<3 & '4'"}}}
USER, ANSWER = {"role": "user", "content": "Hi  <b>there</b> & 'you'\n"}, {"role": "assistant", "content": " 36 🙂 "}
CONVERSATIONS: dict[str, list[Any]] = {
    "one": [USER],
    "three": [USER, ANSWER, {"role": "user", "content": ""}],
    "a system": [{"role": "system", "content": "Be brief. "}, USER],
    "two users": [USER, USER],
    "a system in the middle": [USER, {"role": "system", "content": "x"}, ANSWER, USER, ANSWER],
    "thoughts": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}, USER],
    "thoughts beside": [USER, {"role": "assistant", "content": "Yes.", "thinking": "hm"}],
    "reasoning by two names": [{"role": "assistant", "content": "", "reasoning": "a", "reasoning_content": "b"}],
    "a tool": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": {"sum": 3}},
    ],
    "no content": [USER, {"role": "assistant"}],
    "content None": [USER, {"role": "assistant", "content": None, "tool_calls": None, "name": None}],
    "a call without content": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}],
    "a list of parts": [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": " you"}]}
    ],
    "an image": [{"role": "user", "content": [{"type": "image", "image": "x.png"}, {"type": "text", "text": "?"}]}],
    "a part that is text": [{"role": "user", "content": ["Hi"]}],
    "no role": [{"content": "Hi"}],
    "a number": [{"role": "user", "content": 36}],
    "other keys": [{"role": "user", "content": "Hi", "name": "Ann", "weight": 0.5, "flags": (True, None)}],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds <a> & 'b', é",
            "parameters": {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "integer"}}},
        },
    }
]
DOCUMENTS = [{"title": "Ä", "text": "<one> & 'two'"}]
OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no prompt": {"add_generation_prompt": False},
    "tools": {"tools": TOOLS},
    "no tools": {"tools": []},
    "documents": {"documents": DOCUMENTS},
    "variables": {"enable_thinking": False, "date": "today", "bos_token": "<s>"},
}


def core_of_chats() -> Tokenizer:
    """A byte-level tokenizer with special tokens, added tokens that are not special, and merges that form words."""
    entries = [*SPECIAL, *byte_symbols(), "Ġt", "he", "Ġthe", "ĠĠ"]
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("Ġ", "Ġ")]
    core = Tokenizer(models.BPE(vocab={entry: i for i, entry in enumerate(entries)}, merges=merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN])
    return core


def write_chat_folder(folder: Path, config: dict[str, Any], **files: str) -> Path:
    """Writes a tokenizer folder with this tokenizer_config.json and these extra files."""
    folder.mkdir(exist_ok=True)
    contents = {"tokenizer.json": core_of_chats().to_str(), "tokenizer_config.json": json.dumps(config)} | files
    for name, text in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False, "special": True},
    "pad_token": None,
    "unk_token": "<|endoftext|>",
    "image_token": "<|im_end|>",
    "additional_special_tokens": ["<|im_start|>"],
}
