"""A tokenizer's chat templates: which there are, which a chat takes, and the text it writes.

Source of the rules: transformers 5.23, tokenization_utils_base.py, `_from_pretrained` and `get_chat_template`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from smollm_jax.errors import InputFileError, UsageError, short_repr
from smollm_jax.runtime.files import one_line
from smollm_jax.tokenizer.conversation import Continued, Conversation
from smollm_jax.tokenizer.template_environment import MARKS, compile_template
from smollm_jax.tokenizer.tokenizer_json import Files, json_of, text_of

MAX_TEMPLATE = 1 << 16  # characters; the longest released have 20,000
EXTRA = "additional_chat_templates/"


class Marks(Protocol):
    """What marks the texts of a conversation before a template sees them (`chat_tokens`)."""

    pair: str

    def choose(self, texts: list[str], unmarked: Iterable[str]) -> Callable[[str], str] | None: ...


@dataclasses.dataclass(frozen=True)
class ChatTemplates:
    """The chat templates of one tokenizer, by name; each is compiled when a chat first asks for it.

    `sources` has of each the file it stands in and its text, or the error that reading it gave: a template at fault
    harms the chat that asks for it, and nothing else.
    """

    sources: Mapping[str, tuple[str, object]]

    @classmethod
    def from_files(cls, files: Files, config: Mapping[str, Any], where: str) -> "ChatTemplates":
        """The templates in a tokenizer's files; `config` is its tokenizer_config.json.

        `chat_template.jinja` and `additional_chat_templates/NAME.jinja` replace those of the config;
        `chat_template.json`, which belongs to processors, counts where there is no other.
        """
        names = {"default": "chat_template.jinja"} if "chat_template.jinja" in files else {}
        names |= {name.removeprefix(EXTRA).removesuffix(".jinja"): name for name in files if name.startswith(EXTRA)}
        if names:
            return cls({key: (f"{where}/{name}", _read(text_of, files, name, where)) for key, name in names.items()})
        value, path = config.get("chat_template"), f"{where}/tokenizer_config.json"
        if value is None and "chat_template.json" in files:
            path, held = f"{where}/chat_template.json", _read(json_of, files, "chat_template.json", where)
            value = held.get("chat_template") if isinstance(held, dict) else held
        if isinstance(value, list) and all(
            isinstance(entry, dict) and {"name", "template"} <= {*entry} for entry in value
        ):
            value = {str(entry["name"]): entry["template"] for entry in value}
        named = value if isinstance(value, dict) else {} if value is None else {"default": value}
        return cls({name: (path, template) for name, template in named.items()})

    def __bool__(self) -> bool:
        return bool(self.sources)

    def source(self, name: str | None = None, *, tools: bool = False) -> str:
        """The text of a template: by its name, else "tool_use" for tools where there is one, else the default.

        A name that is itself a template's text is that template. Raises `UsageError` where there is none of that name,
        `InputFileError` where it is no usable text.
        """
        return self._find(name, tools)[1]

    def _find(self, name: str | None, tools: bool) -> tuple[str, str]:
        if name is not None and name not in self.sources and "{" in name:
            path, template = "the template given", name
        elif not self.sources:
            raise UsageError("this tokenizer has no chat template: use an Instruct model's folder")
        else:
            wanted = name if name is not None else "tool_use" if tools and "tool_use" in self.sources else "default"
            if wanted not in self.sources:
                names = ", ".join(map(short_repr, sorted(self.sources)))
                raise UsageError(f"this tokenizer has no chat template {short_repr(wanted)}, only {names}")
            path, template = self.sources[wanted]
        if isinstance(template, InputFileError):
            raise template
        if not isinstance(template, str) or len(template) > MAX_TEMPLATE:
            what = f"a string of at most {MAX_TEMPLATE:,} characters"
            raise InputFileError(f"{path}: chat_template must be {what}, got {short_repr(template)}")
        return path, template

    def render(
        self,
        conversation: Conversation,
        roles: Mapping[str, str],
        *,
        name: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        marks: Marks | None = None,
    ) -> str:
        """The text of a conversation; `roles` are the special tokens by name, which templates read as variables.

        With `continue_final_message`, true or the name of a field, the text ends where that field of the last message
        ends, and there is no generation prompt. Raises `UsageError` in one line when the template or the messages are
        at fault, `InputFileError` when the template does not compile.
        """
        path, source = self._find(name, conversation.tools is not None)
        template = compile_template(source, path)
        texts: list[str] = []
        given = conversation.changed(lambda text: texts.append(text) or text)
        if marks is not None and (change := marks.choose(texts, [source, *roles.values()])) is not None:
            given = given.changed(change)
            roles = {MARKS: marks.pair, **roles}
        continued = Continued(given.messages, continue_final_message, source) if continue_final_message else None
        try:
            text = template.render(
                messages=given.messages if continued is None else continued.messages,
                tools=given.tools,
                documents=given.documents,
                add_generation_prompt=add_generation_prompt and continued is None,
                **{**roles, **given.variables},
            )
        except Exception as error:  # whatever the template's own code raises
            reason = given.lacking(error) + one_line(error)
            raise UsageError(f"the chat template does not accept these messages: {reason}") from error
        return text if continued is None else continued.cut(text)


def _read(read: Callable[[Files, str, str], Any], files: Files, name: str, where: str) -> Any:
    """What `read` makes of a file, or the error that says what is wrong with it."""
    try:
        return read(files, name, where)
    except InputFileError as error:
        return error
