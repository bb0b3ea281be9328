"""Text to token ids and back: a thin layer over the `tokenizers` library, and the chat template.

SmolLM2's tokenizer is a byte-level BPE of 49,152 entries; its pre-tokenizer splits digits one by one and then works
as GPT-2's. Ids fit in uint16.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from smollm_jax.errors import InputFileError, UsageError

Message = dict[str, str]


class Tokenizer:
    """One tokenizer folder: `tokenizer.json`, and its `tokenizer_config.json` for eos and the chat template."""

    def __init__(self, core: tokenizers.Tokenizer, eos_token_id: int | None, chat_template: str | None):
        self.core = core
        self.eos_token_id = eos_token_id
        self.chat_template = chat_template
        self.vocab_size = core.get_vocab_size()
        vocabulary = core.get_vocab(with_added_tokens=False)
        lacking = bytes(byte for byte, symbol in enumerate(_byte_symbols()) if symbol not in vocabulary)
        self._lacking = re.compile(b"[" + re.escape(lacking) + b"]") if lacking else None
        self._special = [token.content for token in core.get_added_tokens_decoder().values() if token.special]

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer in a folder; raises `InputFileError` naming the file that is missing or malformed."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise InputFileError(f"{path}: no such file; `python scripts/fetch_assets.py tokenizer` fetches SmolLM2's")
        try:
            core = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # malformed files make tokenizers raise PanicException, no Exception at all
            raise InputFileError(f"{path}: not a readable tokenizer: {error}") from error
        config, template = {}, None
        beside = Path(folder) / "tokenizer_config.json"
        if beside.is_file():
            try:
                config = json.loads(beside.read_text(encoding="utf-8"))
                eos = config.get("eos_token")
                template = config.get("chat_template")
            except (ValueError, AttributeError) as error:
                raise InputFileError(f"{beside}: not a JSON object: {error}") from error
            eos = eos["content"] if isinstance(eos, dict) else eos
        else:
            eos = None
        if (Path(folder) / "chat_template.jinja").is_file():
            template = (Path(folder) / "chat_template.jinja").read_text(encoding="utf-8")
        eos_token_id = None if eos is None else core.token_to_id(eos)
        if eos is not None and eos_token_id is None:
            raise InputFileError(f"{beside}: eos_token {eos!r} is not in the vocabulary")
        return cls(core, eos_token_id, template)

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of a text. A special token typed in the text is plain text unless `parse_special`.

        Raises `UsageError` for a character the vocabulary has no bytes for: SmolLM2's lacks six control characters
        and U+40000 to U+BFFFF, which `tokenizers` would drop without a word.
        """
        return self._encode_batch([text], parse_special)[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on all cores."""
        return self._encode_batch(list(texts), parse_special=False)

    def _encode_batch(self, texts: list[str], parse_special: bool) -> list[list[int]]:
        for text in texts:
            if reason := self.unencodable(text):
                raise UsageError(f"the text cannot be encoded: {reason}")
        self.core.encode_special_tokens = not parse_special
        return [encoding.ids for encoding in self.core.encode_batch_fast(texts, add_special_tokens=False)]

    def unencodable(self, text: str) -> str | None:
        """Why a text cannot become tokens without loss, or None when it can."""
        try:
            lost = self._lacking and self._lacking.search(text.encode())
        except UnicodeEncodeError as error:
            return f"character {error.start} is a lone surrogate"
        if not lost:
            return None
        place = len(lost.string[: lost.start()].decode(errors="ignore"))
        return f"character {place}, U+{ord(text[place]):04X}, has no token in this vocabulary"

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; bytes that are no whole character show as U+FFFD."""
        return self.core.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_to_id(self, token: str) -> int | None:
        """The id of one entry of the vocabulary, or None."""
        return self.core.token_to_id(token)

    def apply_chat_template(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation of {"role", "content"} messages.

        A special token typed inside a message stays text: only the template's own are special. So a user cannot
        end their turn and speak as another role. Source of the rendering rules: transformers,
        utils/chat_template_utils.py.
        """
        if self.chat_template is None:
            raise UsageError("this tokenizer has no chat template: use an Instruct model's folder")
        # A noncharacter, different from anything in the messages, hides typed special tokens from the split below.
        hide = next(chr(c) for c in range(0xFDD0, 0xFDF0) if all(chr(c) not in m["content"] for m in messages))
        hidden = [dict(message) for message in messages]
        for message in hidden:
            for token in self._special:
                message["content"] = message["content"].replace(token, token[0] + hide + token[1:])
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_template_error
        try:
            template = environment.from_string(self.chat_template)
            text = template.render(messages=hidden, add_generation_prompt=add_generation_prompt)
        except jinja2.TemplateError as error:
            raise UsageError(f"the chat template does not accept these messages: {error}") from error
        ids: list[int] = []
        while text:
            start, token = min(((text.find(t), t) for t in self._special if t in text), default=(len(text), ""))
            ids += self.encode(text[:start].replace(hide, ""))
            ids += self.encode(token, parse_special=True)
            text = text[start + len(token) :]
        return ids


def _byte_symbols() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary. Source: openai/gpt-2, src/encoder.py."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _raise_template_error(message: str) -> None:
    raise jinja2.TemplateError(message)


def folder_beside(weights: Path | None) -> Path:
    """The folder of the tokenizer that lies with some weights (folder, step of a run, file), else assets/tokenizer."""
    if weights is not None:
        for folder in (weights, weights.parent, weights.parent.parent):
            if (folder / "tokenizer.json").is_file():
                return folder
    return Path("assets/tokenizer")


def build(vocabulary: Sequence[str], merges: Sequence[str], special: Sequence[str]) -> tokenizers.Tokenizer:
    """SmolLM2's tokenizer from its vocabulary (in id order) and merges: Digits, then ByteLevel.

    transformers 5.23 rebuilds it from a GGUF without Digits, and then "12" is one token where the model knows two.
    """
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    core = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=pairs))
    digits = pre_tokenizers.Digits(individual_digits=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
    return core


def tokenizer_files(
    core: tokenizers.Tokenizer, max_length: int, roles: dict[str, str | None], chat_template: str | None
) -> dict[str, bytes]:
    """The files of a tokenizer folder; `roles` names bos, eos, unk and pad, None for a role the model has not."""
    present = {f"{role}_token": token for role, token in roles.items() if token is not None}
    config: dict[str, Any] = {
        # Not GPT2Tokenizer, the released name: transformers 5 rebuilds that class without Digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        **present,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    return {
        "tokenizer.json": core.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(),
        "special_tokens_map.json": (json.dumps(present, indent=2) + "\n").encode(),
    }


def files_from_gguf(fields: dict[str, Any], path: Path) -> dict[str, bytes]:
    """The tokenizer folder's files from a GGUF's metadata; raises `InputFileError` for another kind of tokenizer."""
    kind = (fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise InputFileError(f"{path}: tokenizer model and pre-tokenizer {kind}, only ('gpt2', 'smollm') is supported")
    try:
        tokens = fields["tokenizer.ggml.tokens"]
        control = 3  # gguf.TokenType.CONTROL
        special = [token for token, t in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if t == control]
        core = build(tokens, fields["tokenizer.ggml.merges"], special)
        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        ids = {role: fields.get(f"tokenizer.ggml.{name}_token_id") for role, name in names.items()}
        roles = {role: None if i is None else tokens[i] for role, i in ids.items()}
        length = fields["llama.context_length"]
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise InputFileError(f"{path}: tokenizer metadata is malformed: {error!r}") from error
    return tokenizer_files(core, length, roles, fields.get("tokenizer.chat_template"))
