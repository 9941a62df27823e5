"""The one exception that a user sees as a single line."""


class ConfigError(ValueError):
    """The user's mistake: one line that names the key or file and the fix; the commands exit with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # of a library's words there may be several
