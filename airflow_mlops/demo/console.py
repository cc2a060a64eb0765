"""Writing the story to a terminal, or to a file when there is none."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from typing import TextIO

_BOLD, _DIM, _GREEN, _RED, _RESET = "\033[1m", "\033[2m", "\033[32m", "\033[31m", "\033[0m"


class Console:
    """Lines with the time since the start; colors and a progress line only on a terminal.

    :param stream: where to write; default standard output.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.tty = self.stream.isatty()
        self.width = min(shutil.get_terminal_size((110, 24)).columns, 140)
        self._started = time.monotonic()
        self._progress = False
        self._unread = False

    def title(self, text: str) -> None:
        """Begin a chapter."""
        self._write(f"\n{self._paint(text, _BOLD)}")

    def say(self, text: str, color: str = "") -> None:
        """Say something, wrapped under its time."""
        stamp = f"{time.monotonic() - self._started:6.1f} s  "
        lines = textwrap.wrap(text, self.width - len(stamp), break_long_words=False, break_on_hyphens=False)
        wrapped = ("\n" + " " * len(stamp)).join(lines)
        self._write(self._paint(stamp, _DIM) + self._paint(wrapped, color))

    def good(self, text: str) -> None:
        """Say that something went well."""
        self.say(text, _GREEN)

    def bad(self, text: str) -> None:
        """Say that something went wrong, line by line as it is."""
        self._write(self._paint(text, _RED))

    def plain(self, text: str = "") -> None:
        """Write as it is."""
        self._write(text)

    def progress(self, text: str) -> None:
        """Show what is going on in a line that the next one overwrites; nothing off a terminal."""
        if self.tty:
            self._put("\r\033[K" + self._paint(f"          {text}"[: self.width], _DIM))
            self._progress = True

    def _write(self, text: str) -> None:
        clear = "\r\033[K" if self._progress else ""
        self._progress = False
        self._put(f"{clear}{text}\n")

    def _put(self, text: str) -> None:
        """Write; when nobody reads any more, fail once, so that the demo ends, and then be silent."""
        if self._unread:
            return
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            self._unread = True
            raise

    def _paint(self, text: str, color: str) -> str:
        return f"{color}{text}{_RESET}" if self.tty and color else text
