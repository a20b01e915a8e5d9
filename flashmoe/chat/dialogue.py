"""What a line means that somebody types: a question, or a command."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from flashmoe.errors import FlashMoEError

if TYPE_CHECKING:
    from flashmoe.chat.conversation import Answer, Conversation

COMMANDS = {
    "/clear": "forgets the conversation",
    "/regenerate": "answers the last question anew",
    "/help": "lists these",
    "/exit": "ends it, as Ctrl-D does",
}


class Screen(Protocol):
    """Where lines come from and answers go to."""

    def read(self) -> str | None:
        """The next line; None at the end."""

    def show(self, pieces: Answer) -> None:
        """An answer, as it comes. Raises what `pieces` raises."""

    def say(self, text: str) -> None:
        """A sentence that is no answer."""

    def fail(self, error: FlashMoEError) -> None:
        """Say it, or raise it where nobody sits who could go on."""


def run(
    conversation: Conversation,
    screen: Screen,
    watch: Callable[[Answer], Answer],
    check: Callable[[], None],
) -> None:
    """Answer line after line until the end.

    watch: what an answer goes through on its way to the screen.
    check: called when an answer failed; raises FlashMoEError where no other one can be had.
    """
    while (line := screen.read()) is not None:
        line = line.strip()
        try:
            if line == "/exit":
                return
            if line == "/clear":
                conversation.clear()
            elif line == "/regenerate":
                screen.show(watch(conversation.ask_again()))
            elif line == "/help":
                screen.say("\n".join(f"{name} {what}" for name, what in COMMANDS.items()))
            elif re.fullmatch(r"/\w*", line):
                screen.say(f"{line} is no command; there are {', '.join(COMMANDS)}")
            elif line:
                screen.show(watch(conversation.ask(line)))
        except FlashMoEError as error:
            check()
            screen.fail(error)
