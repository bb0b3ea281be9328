"""An example as coloured text, token by token: green between brackets is learnt, grey is read only."""

import unicodedata

from rich.text import Text

from smollm_jax.data.examples.examples import Example
from smollm_jax.tokenizer import Tokenizer
from smollm_jax.tokenizer.tokenizer import TextStream

LEARNT, READ = ("black on green", "black on bright_green"), ("bright_black", "white")  # by turns, a token each
OPEN, CLOSE = "⟦", "⟧"


def mask_of(example: Example, tokenizer: Tokenizer) -> Text:
    """The text of an example, each token in a colour of its own, and brackets around what is learnt.

    Tokens that share a character have one colour; a control character shows as its name.
    """
    shown, stream, within = Text(), TextStream(tokenizer), False
    ids = example.ids.tolist()
    for place, (token, learnt) in enumerate(zip(ids, example.learnt, strict=True)):
        if learnt != within:
            shown.append(OPEN if learnt else CLOSE, style="bold")
            within = learnt
        text = stream.add([token]) + (stream.end() if place + 1 == len(ids) else "")
        shown.append("".join(map(_visible, text)), style=(LEARNT if learnt else READ)[place % 2])
    if within:
        shown.append(CLOSE, style="bold")
    return shown


def _visible(character: str) -> str:
    """A character that a terminal shows: a newline as an arrow before it, others that it would obey by their code."""
    if character == "\n":
        return "↵\n"
    return f"<{ord(character):#04x}>" if unicodedata.category(character) == "Cc" else character
