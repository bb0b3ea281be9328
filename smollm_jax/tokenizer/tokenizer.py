"""The tokenizer: encoding, decoding and chat templates, on top of the `tokenizers` library.

SmolLM2's tokenizer is a byte-level BPE of 49,152 entries; its pre-tokenizer splits digits one by one and then works
as GPT-2's. Ids fit in uint16.
"""

import codecs
import functools
import hashlib
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from smollm_jax.errors import InputFileError, UsageError, short_repr
from smollm_jax.runtime.assets import resolve_asset
from smollm_jax.runtime.panics import catch_panics
from smollm_jax.tokenizer.chat_template import ChatTemplates
from smollm_jax.tokenizer.chat_tokens import encode_answers, encode_chat
from smollm_jax.tokenizer.conversation import Conversation, Message
from smollm_jax.tokenizer.gguf import ForeignTokenizerError
from smollm_jax.tokenizer.source import is_gguf, own_tokenizer, tokenizer_files_at
from smollm_jax.tokenizer.special_tokens import byte_symbols, special_affixes
from smollm_jax.tokenizer.tokenizer_json import read_folder

DEFAULT = Path("assets/tokenizer")  # SmolLM2's, for training from scratch
_BYTE_OF = {symbol: byte for byte, symbol in enumerate(byte_symbols())}


class Tokenizer:
    """A tokenizer and its files: `tokenizer.json`, and `tokenizer_config.json` for its roles and chat template.

    `path` is where it was read, `files` are the contents by name. `roles` are its special tokens by name (`bos_token`).
    `prefix_ids` and `suffix_ids` are the ids that its post-processor adds around a text, such as BOS.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        templates: ChatTemplates | None = None,
        roles: Mapping[str, str] | None = None,
        files: Mapping[str, bytes] | None = None,
        path: Path | None = None,
    ):
        self.core = core
        self.templates = templates or ChatTemplates({})
        self.roles = dict(roles or {})
        self.files = dict(files or {})
        self.path = path or Path("tokenizer")
        eos = self.roles.get("eos_token")
        self.eos_token_id = None if eos is None else core.token_to_id(eos)
        # The largest id plus one: ids may have gaps, and an embedding needs a row for each.
        vocabulary = core.get_vocab(with_added_tokens=False)
        self.vocab_size = max([*vocabulary.values(), *core.get_added_tokens_decoder()], default=-1) + 1
        self._missing_bytes = bytes(byte for byte, symbol in enumerate(byte_symbols()) if symbol not in vocabulary)
        self.prefix_ids, self.suffix_ids = special_affixes(core)
        # llama.cpp also adds BOS before a conversation, transformers only if the chat template contains it.
        self._chat_prefix = self.prefix_ids if is_gguf(self.path) else []

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer of a folder, a `tokenizer.json` or a GGUF.

        Raises `InputFileError` naming the file that is missing or malformed.
        """
        path = Path(path)
        return cls.from_files(tokenizer_files_at(path), path)

    @classmethod
    def of_weights(cls, weights: Path | None, named: Path | None = None) -> "Tokenizer":
        """The tokenizer that belongs to some weights, or the one at `named` if they have none.

        Without weights (a model trained from scratch) it is the one at `named`, else SmolLM2's. Raises
        `InputFileError` if there is none, and `UsageError` if the one at `named` has other ids than the weights' own.
        """
        if weights is not None and not weights.exists():
            raise InputFileError(f"{weights}: no such file or folder")
        own = None if weights is None else own_tokenizer(weights)
        if weights is not None and own is None and named is None:
            raise InputFileError(
                f"{weights}: has no tokenizer: give its folder with --tokenizer "
                "(`python scripts/fetch_assets.py tokenizer` fetches SmolLM2's into assets/tokenizer)"
            )
        if named is None:
            return cls.load(own or resolve_asset(DEFAULT))
        chosen = cls.load(named)
        if own is None or own == named:
            return chosen
        try:
            expected = cls.load(own)
        except ForeignTokenizerError:  # of an unsupported kind
            return chosen
        if expected.core.get_vocab() != chosen.core.get_vocab():
            raise UsageError(f"--tokenizer {named}: its ids differ from those of the tokenizer in {own}; leave it out")
        return chosen

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], path: Path) -> "Tokenizer":
        """The tokenizer in the contents of files by name; `path` is where they were read, for error messages."""
        where = str(path.parent if path.name == "tokenizer.json" else path)
        read = read_folder(files, where)
        templates = ChatTemplates.from_files(files, read.config, where)
        if "tokenizer.json" not in files:  # but vocab.json; data sets identify a tokenizer by this file
            files = {**files, "tokenizer.json": read.core.to_str(pretty=True).encode()}
        return cls(read.core, templates, read.roles, files, path)

    @property
    def chat_template(self) -> str | None:
        """The text of the default chat template, or None; raises as `ChatTemplates.source` does."""
        return self.templates.source() if "default" in self.templates.sources else None

    @functools.cached_property
    def sha256(self) -> str:
        """The sha256 of `tokenizer.json`, which token files store to identify their tokenizer."""
        return hashlib.sha256(self.files["tokenizer.json"]).hexdigest()

    def encode(self, text: str, *, parse_special: bool = False, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text. A special token typed in the text is plain text unless `parse_special`.

        `add_special_tokens` adds the ids of the post-processor, as `tokenizer(text)` of transformers does; SmolLM2's
        has none. Raises `UsageError` for a character that the vocabulary cannot represent: SmolLM2's lacks six control
        characters and U+40000 to U+BFFFF, which `tokenizers` would silently drop. Raises as `encodings` does.
        """
        ids = self._encode_batch([text], parse_special)[0]
        return [*self.prefix_ids, *ids, *self.suffix_ids] if add_special_tokens else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on all cores."""
        if isinstance(texts, str):
            raise UsageError("texts must be a sequence of strings, not a string")
        return self._encode_batch(list(texts), parse_special=False)

    def _encode_batch(self, texts: list[str], parse_special: bool) -> list[list[int]]:
        for text in texts:
            if not isinstance(text, str):
                raise UsageError(f"a text must be a string, got {short_repr(text)}")
            if reason := self.unencodable(text):
                raise UsageError(f"the text cannot be encoded: {reason}")
        self.core.encode_special_tokens = not parse_special
        return [encoding.ids for encoding in self.encodings(texts)]

    def encodings(self, texts: list[str]) -> list[tokenizers.Encoding]:
        """The encodings of texts, parsing special tokens unless `core.encode_special_tokens` is set.

        Raises `InputFileError` where the tokenizer's regex gives up on a text: `tokenizers` panics then.
        """
        encode = functools.partial(self.core.encode_batch_fast, texts, add_special_tokens=False)
        return catch_panics(encode, str(self.path), "the tokenizer cannot encode a text")

    def unencodable(self, text: str) -> str | None:
        """Why a text cannot be encoded without loss, or None if it can."""
        try:
            content = text.encode()
        except UnicodeEncodeError as error:
            return f"character {error.start} is a lone surrogate"
        if len(content.translate(None, self._missing_bytes)) == len(content):
            return None
        offset = min(i for byte in self._missing_bytes if (i := content.find(byte)) >= 0)
        position = len(content[:offset].decode(errors="ignore"))
        return f"character {position}, U+{ord(text[position]):04X}, has no token in this vocabulary"

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; bytes of an incomplete character become U+FFFD.

        Raises `UsageError` for anything but token ids. Ids without a token, as in a padded embedding, are skipped.
        """
        try:
            numbers = [operator.index(i) for i in ids]
            return self.core.decode(numbers, skip_special_tokens=False)
        except (TypeError, OverflowError) as error:
            raise UsageError(f"token ids must be a sequence of non-negative integers, got {short_repr(ids)}") from error

    def byte_count(self, ids: Iterable[int]) -> int:
        """The number of UTF-8 bytes in the text of token ids; special tokens count as 0 bytes."""
        decoder = self.core.get_added_tokens_decoder()
        special = {i for i, token in decoder.items() if token.special}
        added = {i: len(token.content.encode()) for i, token in decoder.items()}  # not byte symbols
        sizes = {int(i): len(self.core.id_to_token(int(i)) or "") for i in set(ids)}  # one symbol per byte
        sizes |= added | dict.fromkeys(special, 0)
        return sum(sizes.get(int(i), 0) for i in ids)

    def token_bytes(self, i: int) -> bytes:
        """The bytes of one token; several tokens may share a character."""
        token = self.core.id_to_token(i) or ""
        try:
            return bytes(_BYTE_OF[symbol] for symbol in token)
        except KeyError:  # an added token, whose text is not in byte symbols
            return token.encode()

    def token_to_id(self, token: str) -> int | None:
        """The id of one entry of the vocabulary, or None."""
        return self.core.token_to_id(token)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation of {"role", "content"} messages, as transformers' method of this name gives them.

        Unlike there, the text of a special token inside a message stays text, so that a user cannot end their turn and
        speak as another role. `template` is the name of one of the tokenizer's templates, or a template's text. For a
        GGUF that asks for BOS, the ids begin with it, once, as in llama.cpp.
        """
        ids = encode_chat(
            self,
            Conversation(messages, tools, documents, variables),
            name=template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        prefix = self._chat_prefix
        return ids if ids[: len(prefix)] == prefix else [*prefix, *ids]

    def encode_answers(
        self,
        messages: Sequence[Message],
        answers: Sequence[int],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        limit: int | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a conversation, and of each message numbered in `answers` the tokens a model is to write.

        Those are `ids[start:stop]`: from behind the generation prompt through the token that ends the turn. Answers
        that start after `limit` tokens are left out, but for the first. Raises `UsageError` for a template that writes
        a message otherwise when others follow it.
        """
        ids, spans = encode_answers(self, Conversation(messages, tools, None, variables or {}), answers, limit)
        prefix = [] if ids[: len(self._chat_prefix)] == self._chat_prefix else self._chat_prefix
        return [*prefix, *ids], [(start + len(prefix), stop + len(prefix)) for start, stop in spans]


class TextStream:
    """Decodes token ids incrementally into complete characters, in time linear in the number of ids.

    Bytes of an incomplete character are held back. All results of `add` and `end`, joined, equal `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: Iterable[int]) -> str:
        """The characters that these ids complete."""
        return self._decoder.decode(b"".join(self._tokenizer.token_bytes(int(i)) for i in ids))

    def end(self) -> str:
        """The rest of the text: U+FFFD if it ends inside a character, else nothing."""
        return self._decoder.decode(b"", final=True)
