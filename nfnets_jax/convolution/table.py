"""The implementation measured fastest for each pass of a convolution, by platform and signature.

    python -m benchmarks.convolution --write

measures every implementation on the machine it runs on, and rewrites that platform's part of this
file with the fewest entries that give the same lookups. nfnets_jax/convolution/conv.py defines the
keys and names. A platform without a part uses XLA's own implementation: a GPU until that command
was run on one, and a TPU, for whose matrix unit the groups of 128 were designed.
"""

# fmt: off
# platform: {(kernel, stride, groups, in, out, positions): (forward, gradient of x, gradient of w)}
TABLE: dict[str, dict[tuple[int, ...], tuple[str, str, str]]] = {
    'cpu': {
        (1, 1, 1, 1536, 768, 288): ('pointwise', 'pointwise', 'pointwise'),
        (3, 1, 1, 128, 128, 4608): ('nhwc_grads', 'nhwc_grads', 'nhwc_grads'),
        (3, 1, 2, 128, 128, 1152): ('per_group', 'per_group', 'per_group'),
        (3, 1, 10, 8, 8, 6272): ('per_group', 'im2col', 'per_group'),
        (3, 1, 43, 8, 8, 288): ('xla', 'im2col', 'im2col'),
    },
}
