"""The terminal's screen, by prompt_toolkit: editing with history, and answers that grow."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

from prompt_toolkit import PromptSession, print_formatted_text
from prompt_toolkit.application import Application, in_terminal
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.key_binding.key_processor import KeyPress
from prompt_toolkit.layout import FormattedTextControl, HSplit, Layout, Window
from prompt_toolkit.renderer import print_formatted_text as print_on
from prompt_toolkit.styles import default_ui_style

from flashmoe.chat.conversation import Answer, Piece
from flashmoe.errors import FlashMoEError

_DIM = "dim"
_REDRAW_SECONDS = 0.03  # at least, between two drawings of a line that grows
_REFRESH_SECONDS = 0.5  # of the status line


class Terminal:
    """A `Screen` for whoever sits at it. status: a line to show at the bottom."""

    def __init__(self, runner: asyncio.Runner, status: Callable[[], str] | None) -> None:
        self._runner = runner
        self._status = status
        self._session: PromptSession[str] = PromptSession(
            "> ", history=_history(), key_bindings=_newline_by_alt_enter(), bottom_toolbar=status
        )

    def read(self) -> str | None:
        try:
            return self._runner.run(self._session.prompt_async())
        except KeyboardInterrupt:  # as in a shell, Ctrl-C gives the line up
            return ""
        except EOFError:
            return None

    def show(self, pieces: Answer) -> None:
        self._runner.run(_View(pieces, self._status).run())

    def say(self, text: str) -> None:
        print_formatted_text(FormattedText([(_DIM, text)]))

    def fail(self, error: FlashMoEError) -> None:
        print_formatted_text(FormattedText([("ansired", str(error))]))


class _View:
    """An answer that comes: whole lines are printed for good, the last one is drawn as it grows.

    Ctrl-C stops it. What else is typed waits for the next prompt.
    """

    def __init__(self, pieces: Answer, status: Callable[[], str] | None) -> None:
        self._pieces = pieces
        self._line: list[tuple[str, str]] = []  # styles and texts
        windows = [Window(FormattedTextControl(self._drawn), wrap_lines=True)]
        if status:
            bar = FormattedTextControl(lambda: [("class:bottom-toolbar.text", status())])
            windows.append(Window(bar, height=1, style="class:bottom-toolbar"))
        keys = KeyBindings()
        keys.add("c-c")(self._stop)
        keys.add("<sigint>")(self._stop)
        keys.add("<any>")(lambda event: self._typed.extend(event.key_sequence))
        self._app: Application[None] = Application(
            Layout(HSplit(windows)), key_bindings=keys, erase_when_done=True,
            min_redraw_interval=_REDRAW_SECONDS, refresh_interval=_REFRESH_SECONDS,
        )  # fmt: skip
        self._stopped = False
        self._typed: list[KeyPress] = []

    async def run(self) -> None:
        """Returns when it has ended or was stopped. Raises FlashMoEError where it fails."""
        try:
            await self._app.run_async(pre_run=self._begin)
        finally:
            typed = [*self._typed, *get_typeahead(self._app.input)]
            store_typeahead(self._app.input, typed)
            if self._stopped:
                self._line.append((_DIM, " [stopped]"))
            if self._line:
                self._print([*self._line, ("", "\n")])

    def _begin(self) -> None:
        self._app.create_background_task(self._take())

    def _drawn(self) -> FormattedText:
        return FormattedText([*(self._line or [(_DIM, "...")]), ("[SetCursorPosition]", "")])

    def _stop(self, event: KeyPressEvent) -> None:
        self._stopped = True
        event.app.exit()  # which ends `_take`

    async def _take(self) -> None:
        try:
            async with aclosing(self._pieces):
                async for piece in self._pieces:
                    await self._add(piece)
        except FlashMoEError as error:
            self._end(error)
        else:
            self._end(None)

    def _end(self, error: FlashMoEError | None) -> None:
        if self._app.is_done:
            return
        if error:
            self._app.exit(exception=error)
        else:
            self._app.exit()

    async def _add(self, piece: Piece) -> None:
        style = _DIM if piece.is_reasoning else ""
        text = piece.text
        if self._line and text and self._line[-1][0] != style:  # the answer follows the thoughts
            text = "\n" + text
        whole, newline, rest = text.rpartition("\n")
        if newline:
            lines, self._line = [*self._line, (style, whole + newline)], []
            async with in_terminal():
                self._print(lines)
        if rest:
            self._line.append((style, rest))
            self._app.invalidate()

    def _print(self, parts: list[tuple[str, str]]) -> None:
        print_on(self._app.output, FormattedText(parts), default_ui_style())


def _newline_by_alt_enter() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history() -> History:
    """Of lines typed, for this user's eyes; of this run alone where it cannot be kept."""
    configured = Path(os.environ.get("XDG_STATE_HOME", ""))
    try:
        state = configured if configured.is_absolute() else Path.home() / ".local" / "state"
        path = state / "flashmoe" / "chat-history"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with path.open("ab"):
            return FileHistory(path)
    except (OSError, RuntimeError):  # no home, or no place to write to
        return InMemoryHistory()
