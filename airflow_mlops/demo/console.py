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

    def title(self, text: str) -> None:
        """Begin a chapter."""
        self._write(f"\n{self._paint(text, _BOLD)}")

    def say(self, text: str) -> None:
        """Say something, wrapped under its time."""
        stamp = f"{time.monotonic() - self._started:6.1f} s  "
        lines = textwrap.wrap(text, self.width - len(stamp), break_long_words=False, break_on_hyphens=False)
        self._write(self._paint(stamp, _DIM) + ("\n" + " " * len(stamp)).join(lines))

    def good(self, text: str) -> None:
        """Say that something went well."""
        self.say(self._paint(text, _GREEN))

    def bad(self, text: str) -> None:
        """Say that something went wrong, line by line as it is."""
        self._write(self._paint(text, _RED))

    def plain(self, text: str = "") -> None:
        """Write as it is."""
        self._write(text)

    def progress(self, text: str) -> None:
        """Show what is going on in a line that the next one overwrites; nothing off a terminal."""
        if self.tty:
            self.stream.write("\r\033[K" + self._paint(f"          {text}"[: self.width], _DIM))
            self.stream.flush()
            self._progress = True

    def _write(self, text: str) -> None:
        if self._progress:
            self.stream.write("\r\033[K")
            self._progress = False
        self.stream.write(text + "\n")
        self.stream.flush()

    def _paint(self, text: str, color: str) -> str:
        return f"{color}{text}{_RESET}" if self.tty else text
