"""`UsageError` for invalid user input, and helpers for its message."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType


class UsageError(ValueError):
    """The user gave an invalid name, value or file.

    The message is one line that names the key or file and says what is valid. The command-line
    programs print it and exit with status 2. Every other exception is a bug of this project and
    keeps its stack trace.

    Args:
      message: the line.
      keys: the config's keys in it, in order, so that `rename_keys` does not have to guess them.
    """

    def __init__(self, message: str = '', *keys: str):
        super().__init__(message)
        self.keys = keys


def rename_keys(error: BaseException, name: Callable[[str], str]) -> str:
    """Returns the message of an error with `name(key)` for each of its `keys`, if it has some."""
    renamed, rest = '', str(error)
    for key in getattr(error, 'keys', ()):
        before, found, rest = rest.partition(key)
        renamed += before + (name(key) if found else '')
    return renamed + rest


def first_line(error: BaseException) -> str:
    """Returns the first line of the message of another library's exception."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def nearest(
    name: object, known: Iterable[object], aliases: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Returns ' (did you mean ...?)' with the nearest of `known`, or a list of all of them.

    Case, '-', '_' and spaces are ignored. The last part of a dotted name matches too, and so do
    common names of other projects ('lr', 'epochs').

    Args:
      name: the unknown name.
      known: the valid names.
      aliases: alias -> the name in `known` to suggest instead.
    """
    names = [str(k) for k in known]
    if found := _nearest(str(name), [*names, *aliases]):
        return f' (did you mean {aliases.get(found, found)!r}?)'
    return f' (known: {", ".join(names)})'


def fold(name: str) -> str:
    """Returns a name in lower case, without '-', '_' and spaces."""
    return re.sub(r'[-_\s]', '', name).lower()


def _nearest(name: str, known: Sequence[str]) -> str | None:
    folded: dict[str, str] = {}
    for candidate in known:
        folded.setdefault(fold(candidate), candidate)
    node, _, last = fold(name).rpartition('.')
    meant = (last, *map(fold, _SYNONYMS.get(last, ())))
    if close := _first(folded, [f'{node}.{word}' if node else word for word in meant]):
        return close
    # The same field of another node: 'learning_rate' is 'optimizer.learning_rate'.
    lasts: dict[str, str] = {}
    for candidate, original in folded.items():
        lasts.setdefault(candidate.rpartition('.')[2], original)
    if close := _first(lasts, meant):
        return close
    similar = [folded[one] for one in difflib.get_close_matches(fold(name), folded, cutoff=0.5)]
    # Among equally near folded names, prefer the most similar spelling.
    return max(similar, key=lambda one: _likeness(name, one), default=None)


def _likeness(name: str, other: str) -> tuple[float, ...]:
    return tuple(
        difflib.SequenceMatcher(None, a, b).ratio()
        for a, b in ((fold(name), fold(other)), (name, other))
    )


def _first(known: Mapping[str, str], names: Iterable[str]) -> str | None:
    return next((known[name] for name in names if name in known), None)


# Folded names that other projects use -> the names in our configs.
_SYNONYMS: dict[str, tuple[str, ...]] = {
    other: ours
    for others, ours in (
        ('lr baselr peaklr eta', ('learning_rate',)),
        ('bs bsz batch trainbatchsize', ('batch_size',)),
        ('wd l2 l2reg', ('weight_decay',)),
        ('epochs numepochs maxepochs numsteps maxsteps trainsteps', ('duration',)),
        ('e ep eps', ('epochs',)),
        ('it iter iters iteration iterations', ('steps', 'duration')),
        ('steps', ('duration',)),
        ('percent pct', ('%',)),
        ('factor clipfactor clippingfactor', ('clipping',)),
        ('warmupsteps warmupepochs', ('warmup',)),
        ('gradaccum accumsteps gradaccumsteps', ('accumulate',)),
        ('amp dtype bf16 fp16 mixedprecision', ('precision',)),
        ('arch architecture backbone net network', ('model',)),
        ('imgsize imgsz resolution inputsize', ('image_size',)),
        ('dropout dropoutrate', ('drop_rate',)),
        ('droppath droppathrate stochasticdepth', ('stochdepth_rate',)),
        ('smoothing', ('label_smoothing',)),
        ('emadecay', ('ema',)),
        ('pretrained', ('weights',)),
        ('datapath datadir datasetdir root', ('path', 'data_dir')),
    )
    for other in others.split()
}
