"""Text from tokens as they come."""

from tokenizers import Tokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The new text of each token. A character of several tokens comes with its last one.

    What a token adds is the difference between two decodings of the last few tokens: alone it would lose its leading
    space in some tokenizers.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids)
        self._start = 0  # of the tokens that are decoded again
        self._shown = len(prompt_ids)

    def push(self, token_id: int) -> str:
        """The text that this token completes, possibly none."""
        self._ids.append(token_id)
        text = self._unshown()
        if text.endswith(_INCOMPLETE):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text

    def close(self) -> str:
        """What is left: the bytes of an unfinished character, as replacement characters."""
        return self._unshown()

    def _unshown(self) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        return self._tokenizer.decode(self._ids[self._start :])[len(before) :]
