"""A chat answer's Markdown as HTML that is safe to show, whatever the model wrote.

CommonMark with tables and strikethrough, by markdown-it-py. Raw HTML is shown as text, an image as a link, and only
http, https and mailto links are links.
"""

import html
from collections.abc import Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

MAX_CHARACTERS = 20_000  # a longer text is shown as plain text: the slowest of this length take 0.7 seconds
SCHEMES = ("http://", "https://", "mailto:")


class Renderer(RendererHTML):
    """markdown-it's HTML with a copy button at each block of code and links that open in a new tab."""

    def fence(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        """A block of code under a bar with its language and a copy button, which the page's script handles."""
        language, *_ = [*tokens[idx].info.split(), ""]
        button = '<button type="button" class="copy">Copy</button>'
        bar = f'<div class="bar"><span>{html.escape(language)}</span>{button}</div>'
        code = f"<pre tabindex=0><code>{html.escape(tokens[idx].content)}</code></pre>"  # tabindex: keys can scroll it
        return f'<div class="code">{bar}{code}</div>'

    code_block = fence

    def link_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        """The tag, with attributes that give the opened page no access to this one."""
        tokens[idx].attrs |= {"target": "_blank", "rel": "noopener noreferrer nofollow"}
        return self.renderToken(tokens, idx, options, env)

    def table_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        """The tag, in a box that scrolls horizontally."""
        return '<div class="wide" tabindex=0><table>'

    def table_close(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        """The end tags of table and box."""
        return "</table></div>"


def render_markdown(text: str) -> str:
    """The HTML of a Markdown text; a text longer than `MAX_CHARACTERS` is escaped and not rendered."""
    if len(text) > MAX_CHARACTERS:
        return f'<p class="plain">{html.escape(text)}</p>'
    return _markdown.render(text)


def _markdown_it() -> MarkdownIt:
    options = {"html": False, "breaks": True, "linkify": False, "typographer": False, "maxNesting": 100}
    parser = MarkdownIt("commonmark", options, renderer_cls=Renderer).enable(["table", "strikethrough"])
    parser.disable("image")
    parser.validateLink = lambda url: url.strip().lower().startswith(SCHEMES)
    return parser


_markdown = _markdown_it()
