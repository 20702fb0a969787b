"""Text from tokens as they come: a character whose bytes span several tokens appears once it is whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class TextStream:
    """Decodes the tokens that follow ``prompt``, one by one. Special tokens give no text.

    Args:
        tokenizer: of ``transformers``.
        prompt: decoded along, not shown: whether a word begins with a space depends on what stands before it.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)
        # Tokenizers written in Python have no backend: they decode all tokens again each time.
        self._tokens = list(prompt)
        self._shown = self._decode()

    def add(self, token: int) -> str:
        """The text that this token completes; empty while a character is cut in two."""
        if self._backend is not None:
            return self._stream.step(self._backend, token) or ""
        self._tokens.append(token)
        text = self._decode()
        if text.endswith("\N{REPLACEMENT CHARACTER}") or not text.startswith(self._shown):
            return ""
        new = text[len(self._shown) :]
        self._shown = text
        return new

    def _decode(self) -> str:
        return "" if self._backend is not None else str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
