"""The one exception that means: the user asked for something that cannot be; and its words."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A mistake in what the user gave: a name, a value, a file.

    The message is one line that names the key or file and says what would be right.
    The command-line programs print it and exit with status 2; every other exception is
    a bug of ours and keeps its stack trace.
    """


def first_line(error: BaseException) -> str:
    """Returns the beginning of what an exception of another library says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def nearest(name: object, known: Iterable[object]) -> str:
    """Returns ' (did you mean ...?)' with the nearest of `known`, or names them all."""
    names = [str(k) for k in known]
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    if close:
        return f' (did you mean {close[0]!r}?)'
    return f' (known: {", ".join(names)})'
