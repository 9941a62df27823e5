"""The one exception that a user sees as a single line."""


def printable(text: str) -> str:
    """The text with escapes for what would do something to a terminal, and for what no encoding can write."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class ConfigError(ValueError):
    """The user's mistake: one line that names the key or file and the fix; the commands exit with 2."""

    def __init__(self, message: str) -> None:
        # Of a library's words there may be several lines, and names from files may hold anything.
        super().__init__(printable(" ".join(message.splitlines())))
