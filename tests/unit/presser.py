"""Ctrl-C, at the moment when something is on the screen."""

import io
import signal


class Presser(io.StringIO):
    """A screen that presses Ctrl-C when a text appears on it for the first time."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def write(self, text: str) -> int:
        if self._text in text and self._text not in self.getvalue():
            signal.raise_signal(signal.SIGINT)
        return super().write(text)
