"""What a base model lacks to chat: SmolLM2-Instruct's special tokens, chat template and generation config.

Its vocabulary has the tokens already; `<|im_end|>` ends its texts from here on. Framework-free.
"""

import dataclasses
import json
from typing import Any

from smollm_jax.config import Config
from smollm_jax.errors import UsageError
from smollm_jax.tokenizer import Tokenizer

ROLES = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}
# Source: HuggingFaceTB/SmolLM2-135M-Instruct, tokenizer_config.json.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n"
    "' + message['content'] + '<|im_end|>' + '\n"
    "'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"
    "' }}{% endif %}"
)


def with_chat_format(tokenizer: Tokenizer, config: Config) -> tuple[Tokenizer, Config, dict[str, Any] | None]:
    """A tokenizer that can chat, a config with its special ids, and the generation config of the two.

    One that has a chat template stays as it is, and the generation config is None: that of its weights. Raises
    `UsageError` for a vocabulary without the tokens of a chat.
    """
    if tokenizer.chat_template is not None:
        return tokenizer, config, None
    tokenizer = chat_tokenizer(tokenizer)
    special = {f"{name}_id": tokenizer.token_to_id(ROLES[name]) for name in ("bos_token", "eos_token", "pad_token")}
    return tokenizer, dataclasses.replace(config, **special), special


def chat_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer with a chat template: its own, or SmolLM2-Instruct's, and then its special tokens too."""
    if tokenizer.chat_template is not None:
        return tokenizer
    if missing := sorted({token for token in ROLES.values() if tokenizer.token_to_id(token) is None}):
        raise UsageError(
            f"{tokenizer.path}: has no chat template, and no {' and '.join(missing)} to give it SmolLM2's: "
            "start from the weights of a chat model"
        )
    settings = json.loads(tokenizer.files.get("tokenizer_config.json", b"{}"))
    files = dict(tokenizer.files)
    files["tokenizer_config.json"] = _json(settings | ROLES | {"chat_template": TEMPLATE})
    files["special_tokens_map.json"] = _json(ROLES)
    return Tokenizer.from_files(files, tokenizer.path)


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
