"""A tokenizer's chat templates: where they are read, which one is used, and how a conversation is rendered.

Source of the rules: transformers 5.23, tokenization_utils_base.py, `_from_pretrained` and `get_chat_template`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from smollm_jax.errors import InputFileError, UsageError, short_repr
from smollm_jax.runtime.files import one_line
from smollm_jax.tokenizer import template_process
from smollm_jax.tokenizer.conversation import ContinuedMessage, Conversation, Message
from smollm_jax.tokenizer.template_environment import MARKERS
from smollm_jax.tokenizer.tokenizer_json import Files, json_of, text_of

MAX_TEMPLATE = 1 << 16  # characters; the longest of released models have 20,000
NAMED_TEMPLATES = "additional_chat_templates/"


class Markers(Protocol):
    """Marks special tokens in the texts of a conversation before a template renders them (`chat_tokens`)."""

    pair: str

    def choose(self, texts: list[str], unmarked: Iterable[str]) -> Callable[[str], str] | None: ...


@dataclasses.dataclass(frozen=True)
class ChatTemplates:
    """The chat templates of a tokenizer by name; a template is compiled when it is first used.

    It is compiled and rendered in another process, which bounds its time and memory (`template_process`).

    `sources` maps a name to the file and the text of the template, or to the file and the error from reading it: a
    broken template fails only the conversations that use it.
    """

    sources: Mapping[str, tuple[str, object]]

    @classmethod
    def from_files(cls, files: Files, config: Mapping[str, Any], where: str) -> "ChatTemplates":
        """The templates in a tokenizer's files; `config` is its tokenizer_config.json.

        `chat_template.jinja` and `additional_chat_templates/NAME.jinja` replace those in the config.
        `chat_template.json`, a file of processors, is used when there is no other.
        """
        names = {"default": "chat_template.jinja"} if "chat_template.jinja" in files else {}
        extra = [name for name in files if name.startswith(NAMED_TEMPLATES)]
        names |= {name.removeprefix(NAMED_TEMPLATES).removesuffix(".jinja"): name for name in extra}
        if names:
            return cls({key: (f"{where}/{name}", _read(text_of, files, name, where)) for key, name in names.items()})
        value, path = config.get("chat_template"), f"{where}/tokenizer_config.json"
        if value is None and "chat_template.json" in files:
            path, content = f"{where}/chat_template.json", _read(json_of, files, "chat_template.json", where)
            value = content.get("chat_template") if isinstance(content, dict) else content
        if isinstance(value, list) and all(
            isinstance(entry, dict) and {"name", "template"} <= {*entry} for entry in value
        ):
            value = {str(entry["name"]): entry["template"] for entry in value}
        templates = value if isinstance(value, dict) else {} if value is None else {"default": value}
        return cls({name: (path, template) for name, template in templates.items()})

    def __bool__(self) -> bool:
        return bool(self.sources)

    def source(self, name: str | None = None, *, tools: bool = False) -> str:
        """The text of the template `name`; without a name that of "tool_use" for `tools` if it exists, else "default".

        `name` may also be the text of a template. Raises `UsageError` if there is no such template, and
        `InputFileError` if it is not usable.
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
            expected = f"a string of at most {MAX_TEMPLATE:,} characters"
            raise InputFileError(f"{path}: chat_template must be {expected}, got {short_repr(template)}")
        return path, template

    def render(
        self,
        conversation: Conversation,
        roles: Mapping[str, str],
        *,
        name: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        markers: Markers | None = None,
    ) -> str:
        """The text of a conversation; `roles` are the special tokens by name, which templates read as variables.

        With `continue_final_message`, true or the name of a field, the text ends with that field of the last message,
        without a generation prompt. Raises `UsageError` when the template does not accept the messages, and
        `InputFileError` when it does not compile, or takes more time or memory than `template_process` allows.
        """
        chat = self.prepare(conversation, roles, name=name, markers=markers)
        if not continue_final_message:
            return chat.text(add_generation_prompt=add_generation_prompt)
        source = self.source(name, tools=conversation.tools is not None)
        continued = ContinuedMessage(chat.conversation.messages, continue_final_message, source)
        return continued.truncate(chat.text(continued.messages))

    def prepare(
        self,
        conversation: Conversation,
        roles: Mapping[str, str],
        *,
        name: str | None = None,
        markers: Markers | None = None,
    ) -> "PreparedChat":
        """A conversation whose texts are checked and marked, to be rendered whole or as far as some message."""
        path, source = self._find(name, conversation.tools is not None)
        texts: list[str] = []
        given = conversation.map_texts(lambda text: texts.append(text) or text)
        if markers is not None and (mark := markers.choose(texts, [source, *roles.values()])) is not None:
            given = given.map_texts(mark)
            roles = {MARKERS: markers.pair, **roles}
        return PreparedChat(path, source, given, roles)


@dataclasses.dataclass(frozen=True)
class PreparedChat:
    """A template and what it is given; `path` is the file that holds the template."""

    path: str
    source: str
    conversation: Conversation
    roles: Mapping[str, str]

    def text(self, messages: Sequence[Message] | None = None, *, add_generation_prompt: bool = False) -> str:
        """The text of all messages, or of these; raises as `ChatTemplates.render` does."""
        given = self.conversation
        try:
            variables = dict(
                messages=given.messages if messages is None else messages,
                tools=given.tools,
                documents=given.documents,
                add_generation_prompt=add_generation_prompt,
                **{**self.roles, **given.variables},
            )
            return template_process.PROCESS.render(self.source, self.path, variables)
        except InputFileError:
            raise
        except Exception as error:  # a template can raise anything
            reason = given.explain(error) + one_line(error)
            raise UsageError(f"the chat template does not accept these messages: {reason}") from error


def _read(read: Callable[[Files, str, str], Any], files: Files, name: str, where: str) -> Any:
    """The result of `read` for a file, or its error."""
    try:
        return read(files, name, where)
    except InputFileError as error:
        return error
