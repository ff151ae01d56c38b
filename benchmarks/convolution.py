"""Measures the forms a convolution can take, forward and backward, on the default device.

    python -m benchmarks.convolution [--form=split] [--seconds=1] [--dtype=bfloat16]

Prints milliseconds for one forward and backward pass (gradients of input and weight), and
seconds to compile, for each form at shapes that occur in the models. nfnets_jax/convolution.py
chooses by this table.
"""

import argparse
import time

import jax
import jax.numpy as jnp

from nfnets_jax import convolution

# name: (batch, side, in, out, kernel, stride, groups)
CASES = {
    'F0 stage 2, 3x3, 2 groups of 128': (8, 12, 256, 256, 3, 1, 2),
    'F0 stage 3, 3x3, 6 groups of 128': (8, 6, 768, 768, 3, 1, 6),
    'F0 stage 3, 3x3 stride 2': (8, 12, 768, 768, 3, 2, 6),
    'RegNet-B0 stage 2, 10 groups of 8': (8, 28, 80, 80, 3, 1, 10),
    'RegNet-B0 stage 4, 43 groups of 8': (8, 7, 344, 344, 3, 1, 43),
    'RegNet-B8 stage 4, 204 groups of 8': (2, 21, 1632, 1632, 3, 1, 204),
    'F0 stage 3, 1x1 768 to 1536': (8, 6, 768, 1536, 1, 1, 1),
    'ResNet-50 stage 1, 1x1 64 to 256': (8, 56, 64, 256, 1, 1, 1),
    'ResNet-50 stage 3, 1x1 stride 2': (8, 28, 512, 1024, 1, 2, 1),
    'ResNet-20 stage 1, 3x3 16 to 16': (32, 32, 16, 16, 3, 1, 1),
}


def measure(form, case, dtype, seconds):
    """Returns (milliseconds of forward + backward, seconds to compile)."""
    batch, side, inputs, outputs, kernel, stride, groups = case
    shape = convolution.ConvShape(stride, groups, 'SAME')
    key_x, key_w = jax.random.split(jax.random.key(0))
    x = jax.random.normal(key_x, (batch, side, side, inputs), dtype)
    w = jax.random.normal(key_w, (kernel, kernel, inputs // groups, outputs), dtype)

    def loss(x, w):
        return jnp.sum(jnp.square(form(shape, x, w)))

    start = time.perf_counter()
    step = jax.jit(jax.grad(loss, (0, 1))).lower(x, w).compile()
    compile_seconds = time.perf_counter() - start
    jax.block_until_ready(step(x, w))
    times = []
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        jax.block_until_ready(step(x, w))
        times.append(time.perf_counter() - start)
    return 1e3 * min(times), compile_seconds


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    forms = {form.__name__: form for form in (convolution.plain, convolution.split)}
    forms['pointwise'] = convolution.pointwise
    parser.add_argument('--form', action='append', choices=forms, help='may be repeated')
    parser.add_argument('--seconds', type=float, default=0.5, help='per case, after compilation')
    parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
    args = parser.parse_args(argv)
    print(f'{jax.devices()[0].device_kind}, {args.dtype}')
    print(f'{"case":<36} {"form":<10} {"ms":>9} {"compile s":>10}')
    for name, case in CASES.items():
        kernel, groups = case[4], case[-1]
        other = 'split' if groups > 1 else 'pointwise' if kernel == 1 else 'plain'
        for form in dict.fromkeys(['plain', other]):
            if args.form and form not in args.form:
                continue
            ms, compile_s = measure(forms[form], case, jnp.dtype(args.dtype), args.seconds)
            print(f'{name:<36} {form:<10} {ms:9.2f} {compile_s:10.2f}', flush=True)


if __name__ == '__main__':
    main()
