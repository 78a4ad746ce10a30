"""How chats are written for each family of models: a table.

Sources: the model cards of BlinkDL/rwkv-4-raven, rwkv-4-world and rwkv7-g1. Two line breaks end a turn in their
training data, so those inside a turn of the user become one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rwkv_edge.errors import InputError

AUTO = "auto"


@dataclass(frozen=True)
class ChatTemplate:
    """The text around what is said; ``{}`` stands for it.

    Attributes:
        name: in the table.
        system: a system prompt; '' where the models know none.
        user: a turn of the user up to where the model goes on, without a space at the end.
        think: how the answer begins where the model is to think first, else ''.
        stops: texts that end an answer and are not part of it.
        turn_end: stands after an answer, whatever ended it.
    """

    name: str
    system: str
    user: str
    think: str
    stops: tuple[str, ...]
    turn_end: str

    def system_text(self, text: str) -> str:
        """A system prompt as the model reads it.

        Raises:
            InputError: the template has none.
        """
        if not self.system:
            raise InputError(f"the template '{self.name}' has no system prompt; leave --system out")
        return self.system.format(single_spaced(text))

    def user_text(self, text: str) -> str:
        """A turn of the user as the model reads it."""
        return self.user.format(single_spaced(text) if self.turn_end else text) + self.think


THINK_END = "</think>"

TEMPLATES = {
    template.name: template
    for template in (
        # RWKV World knows no system: an assistant's first answer says what it is.
        ChatTemplate("world", "User: hi\n\nAssistant: {}\n\n", "User: {}\n\nAssistant:", "", ("\n\nUser:",), "\n\n"),
        ChatTemplate("g1", "System: {}\n\n", "User: {}\n\nAssistant:", "", ("\n\nUser:", "\n\nSystem:"), "\n\n"),
        ChatTemplate(
            "g1-think", "System: {}\n\n", "User: {}\n\nAssistant:", " <think", ("\n\nUser:", "\n\nSystem:"), "\n\n"
        ),
        ChatTemplate("raven", "{}\n\n", "Bob: {}\n\nAlice:", "", ("\n\n",), "\n\n"),
        ChatTemplate("none", "{}", "{}", "", (), ""),
    )
}
"""Name → template."""

_FAMILIES = ((r"g[01](?![0-9])[a-z]?\d?", "g1"), (r"raven", "raven"), (r"world", "world"))


def template_for(file: str, tokenizer: str) -> ChatTemplate:
    """The template for a model by the name of its checkpoint, else by the kind of its tokenizer.

    Args:
        file: 'rwkv7-g1a-0.1b-20250728-ctx4096.pth'.
        tokenizer: 'world', 'bytes' or 'huggingface'.
    """
    for pattern, name in _FAMILIES:
        if re.search(rf"(?<![a-z0-9]){pattern}(?![a-z0-9])", file.lower()):
            return TEMPLATES[name]
    return TEMPLATES["world" if tokenizer == "world" else "none"]


def single_spaced(text: str) -> str:
    """Without empty lines, and without white space around it."""
    return re.sub(r"\n{2,}", "\n", text.replace("\r\n", "\n").replace("\r", "\n")).strip()
