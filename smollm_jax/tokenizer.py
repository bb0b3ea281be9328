"""Text to token ids and back: a thin layer over the `tokenizers` library, and the chat template.

SmolLM2's tokenizer is a byte-level BPE of 49,152 entries; its pre-tokenizer splits digits one by one and then works
as GPT-2's. Ids fit in uint16.
"""

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from smollm_jax.config import shown
from smollm_jax.errors import InputFileError, UsageError
from smollm_jax.files import one_line, read_json, read_text
from smollm_jax.tokenizer_file import byte_symbols, check_template, read_core, silent_stderr, template_environment

Message = dict[str, str]


class Tokenizer:
    """One tokenizer folder: `tokenizer.json`, and its `tokenizer_config.json` for eos and the chat template."""

    def __init__(self, core: tokenizers.Tokenizer, eos_token_id: int | None, chat_template: str | None):
        self.core = core
        self.eos_token_id = eos_token_id
        self.chat_template = chat_template
        # The largest id and one: an id may lie beyond the count of entries, and an embedding must reach it.
        vocabulary = core.get_vocab(with_added_tokens=False)
        self.vocab_size = max([*vocabulary.values(), *core.get_added_tokens_decoder()], default=-1) + 1
        self._lacking = bytes(byte for byte, symbol in enumerate(byte_symbols()) if symbol not in vocabulary)
        self._special = [token.content for token in core.get_added_tokens_decoder().values() if token.special]

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer in a folder; raises `InputFileError` naming the file that is missing or malformed."""
        path, beside, jinja = (
            Path(folder) / name for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        )
        if not path.is_file():
            raise InputFileError(f"{path}: no such file; `python scripts/fetch_assets.py tokenizer` fetches SmolLM2's")
        core = read_core(path)
        config = read_json(beside) if beside.exists() else {}
        if not isinstance(config, dict):
            raise InputFileError(f"{beside}: not a JSON object")
        eos, template = config.get("eos_token"), config.get("chat_template")
        eos = eos.get("content") if isinstance(eos, dict) else eos
        if "eos_token" in config and config["eos_token"] is not None and type(eos) is not str:
            raise InputFileError(f"{beside}: eos_token must be a string, got {shown(config['eos_token'])}")
        eos_token_id = None if eos is None else core.token_to_id(eos)
        if eos is not None and eos_token_id is None:
            raise InputFileError(f"{beside}: eos_token {shown(eos)} is not in the vocabulary")
        if jinja.exists():
            template, beside = read_text(jinja), jinja
        if template is not None:
            check_template(template, beside)
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
            content = text.encode()
        except UnicodeEncodeError as error:
            return f"character {error.start} is a lone surrogate"
        if len(content.translate(None, self._lacking)) == len(content):
            return None
        first = min(found for byte in self._lacking if (found := content.find(byte)) >= 0)
        place = len(content[:first].decode(errors="ignore"))
        return f"character {place}, U+{ord(text[place]):04X}, has no token in this vocabulary"

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; bytes that are no whole character show as U+FFFD."""
        return self.core.decode([int(i) for i in ids], skip_special_tokens=False)

    def byte_count(self, ids: Iterable[int]) -> int:
        """The bytes of text that token ids stand for; a special token stands for none."""
        special = {i for i, token in self.core.get_added_tokens_decoder().items() if token.special}
        symbols = {int(i): self.core.id_to_token(int(i)) or "" for i in set(ids) - special}
        return sum(len(symbols.get(int(i), "")) for i in ids)  # a byte-level entry has one symbol a byte

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
        try:
            template = template_environment().from_string(self.chat_template)
            text = template.render(messages=hidden, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # whatever the template's own code raises
            raise UsageError(f"the chat template does not accept these messages: {one_line(error)}") from error
        ids: list[int] = []
        while text:
            start, token = min(((text.find(t), t) for t in self._special if t in text), default=(len(text), ""))
            ids += self.encode(text[:start].replace(hide, ""))
            ids += self.encode(token, parse_special=True)
            text = text[start + len(token) :]
        return ids


class TextStream:
    """The text of token ids that come a few at a time, in whole characters; linear in the number of ids.

    Bytes that may yet become a character are held back. The pieces and `end()`, joined, are `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._core = tokenizer.core
        self._byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: Iterable[int]) -> str:
        """The characters that these ids complete."""
        return self._decoder.decode(b"".join(self._bytes(int(i)) for i in ids))

    def end(self) -> str:
        """What was held back: U+FFFD when the text ends inside a character, else nothing."""
        return self._decoder.decode(b"", final=True)

    def _bytes(self, i: int) -> bytes:
        token = self._core.id_to_token(i) or ""
        try:
            return bytes(self._byte_of[symbol] for symbol in token)
        except KeyError:  # an added token, which stands for itself
            return token.encode()


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


def files_from_gguf(fields: dict[str, Any], vocab_size: int, path: Path) -> dict[str, bytes]:
    """The tokenizer folder's files from a GGUF's metadata; raises `InputFileError` naming the key that is malformed."""

    def get(name: str, of: type) -> list[Any]:
        values = fields.get(f"tokenizer.ggml.{name}")
        if type(values) is not list or not all(type(value) is of for value in values):
            raise InputFileError(f"{path}: metadata tokenizer.ggml.{name} must be an array of {of.__name__}")
        return values

    kind = tuple(fields.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind != ("gpt2", "smollm"):
        raise InputFileError(
            f"{path}: metadata tokenizer.ggml.model and .pre are {shown(kind)}, only ('gpt2', 'smollm') is supported"
        )
    tokens, types, merges = get("tokens", str), get("token_type", int), get("merges", str)
    if not len(tokens) == len(set(tokens)) == len(types) <= vocab_size:
        counts = f"{len(tokens)} tokens, {len(set(tokens))} of them distinct, {len(types)} types"
        raise InputFileError(f"{path}: metadata tokenizer.ggml.tokens: {counts}, a vocabulary of {vocab_size}")
    roles: dict[str, str | None] = {}
    for role, name in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        i = fields.get(f"tokenizer.ggml.{name}_token_id")
        if i is not None and not (type(i) is int and 0 <= i < len(tokens)):
            raise InputFileError(f"{path}: metadata tokenizer.ggml.{name}_token_id is {shown(i)}, no token")
        roles[role] = None if i is None else tokens[i]
    template = fields.get("tokenizer.chat_template")
    if template is not None:
        check_template(template, path)
    control = 3  # gguf.TokenType.CONTROL
    try:
        with silent_stderr():
            core = build(tokens, merges, [token for token, t in zip(tokens, types, strict=True) if t == control])
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InputFileError(f"{path}: metadata tokenizer.ggml.merges: {one_line(error)}") from error
    return tokenizer_files(core, fields["llama.context_length"], roles, template)
