"""Mistakes that a user can mend. Each is printed as one paragraph, without a stack trace, and ends with exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MetarlError(Exception):
    """The text says what is wrong and what to do about it."""


class ConfigError(MetarlError):
    """A setting that cannot be used: which key, which value, what is allowed, and the nearest match.

    Args:
        key: the dotted key as the user types it, e.g. `algo.inner_lr`.
        value: the value given, or `None` where the key itself is the mistake.
        problem: what is wrong, in a few words that follow the key and value, e.g. `must be positive`.
        allowed: what would be right; a misspelt string is answered with the nearest of them.
        hint: what else to do, a full sentence.
    """

    def __init__(
        self,
        key: str,
        value: object,
        problem: str,
        *,
        allowed: Iterable[object] | None = None,
        hint: str = "",
    ):
        self.key, self.value, self.problem = key, value, problem
        options = [str(option) for option in allowed] if allowed is not None else []
        parts = [f"{key}={value}: {problem}." if value is not None else f"{key}: {problem}."]
        if options:
            parts.append(f"Allowed: {', '.join(options)}.")
            word = str(value if value is not None else key)
            nearest = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
            if nearest and not isinstance(value, int | float):  # 3 is not a misspelt 32
                parts.append(f"Did you mean {nearest[0]}?")
        if hint:
            parts.append(hint)
        super().__init__(" ".join(parts))


class RunError(MetarlError):
    """A run directory that cannot be used: which file, why, and what to do."""


class Misfit(RunError):
    """A checkpoint of another algorithm, or made with other settings."""
