"""Which form each pass of a convolution takes, by platform and size: what was measured fastest.

    python -m benchmarks.convolution --write

measures every form on the machine it runs on, and writes that platform's part of this file, as few
entries as say the same. See nfnets_jax/convolution/conv.py for what keys and names mean. A platform
without a part takes XLA's own form: a GPU until that command was run on one; a TPU, whose matrix
unit the groups of 128 were made for.
"""

# fmt: off
# platform: {(kernel, stride, groups, in, out, positions): forms of (forward, x's and w's gradient)}
TABLE: dict[str, dict[tuple[int, ...], tuple[str, str, str]]] = {
    'cpu': {
        (1, 1, 1, 1536, 768, 288): ('pointwise', 'pointwise', 'pointwise'),
        (3, 1, 1, 128, 128, 4608): ('canonical', 'canonical', 'canonical'),
        (3, 1, 2, 128, 128, 1152): ('split', 'split', 'split'),
        (3, 1, 10, 8, 8, 6272): ('split', 'batched', 'split'),
        (3, 1, 43, 8, 8, 288): ('plain', 'batched', 'batched'),
        (3, 2, 1, 64, 128, 4608): ('canonical', 'canonical', 'canonical'),
    },
}
