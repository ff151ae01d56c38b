"""Measures every implementation of the convolutions of networks, and writes the lookup table.

    python -m benchmarks.convolution
    python -m benchmarks.convolution --networks=NFNet-F0:96 --batch=8 --dtype=float32 --loop
    python -m benchmarks.convolution --write

Prints milliseconds of the forward pass, the input's gradient and the weight's gradient, and seconds
to compile the three, for each implementation at each signature of a convolution in the networks.
On a GPU the defaults take about 15 minutes. --write puts the fastest implementations into
nfnets_jax/convolution/table.py as the part of this machine's platform, and keeps the parts of other
platforms; run the tests then. An implementation other than XLA's own must win by a tenth, where a
second of compilation counts as a millisecond, as if spread over a thousand steps. On a CPU the
time is that of all processors, which other programs change little, and `nhwc_grads` replaces XLA's
own as the default: it takes as long outside of a loop, and XLA's takes 10 to 100 times as long in
one. --loop measures each pass in a loop of two rounds.
"""

import argparse
import functools
import pathlib
import time
from unittest import mock

import haiku as hk
import jax
import jax.numpy as jnp

from benchmarks import timing
from experiments.launch import cli
from nfnets_jax import create_model, files
from nfnets_jax.convolution import conv, table
from nfnets_jax.convolution.conv import ConvOptions, ConvSignature, Impl

NETWORKS = {
    'gpu': 'NFNet-F0:192,NFNet-F1:224,NFNet-F3:320,NF-ResNet-50:224,NF-RegNet-B1:224',
    'cpu': 'NFNet-F0:96,NF-RegNet-B0:96,NF-ResNet-50:96',
}
PASSES = Impl._fields


def signatures(
    networks: str, batch: int
) -> dict[ConvSignature, tuple[str, ConvOptions, tuple, tuple]]:
    """Returns the convolutions of 'model:pixels,...', once each: signature -> (network, call)."""
    found: dict[ConvSignature, tuple[str, ConvOptions, tuple, tuple]] = {}
    for network in networks.split(','):
        model, _, pixels = network.partition(':')

        def note(x, w, stride=1, *, groups=1, padding='SAME', network=network):
            options = ConvOptions(stride, groups, padding)
            signature = conv.conv_signature(options, x.shape, w.shape)
            found.setdefault(signature, (network, options, x.shape, w.shape))
            return conv.xla(options, x, w)

        def forward(images, model=model):
            return create_model(model, 1000)(images, False)

        images = jax.ShapeDtypeStruct((batch, int(pixels), int(pixels), 3), jnp.float32)
        with mock.patch.object(conv, 'conv2d', note):
            jax.eval_shape(hk.transform_with_state(forward).init, jax.random.key(0), images)
    return found


def passes(name: str, options: ConvOptions):
    """Returns the passes of an implementation, each a function of (x, w, cotangent)."""
    impl = conv.IMPLS[name]
    return {
        'forward': lambda x, w, _: impl(options, x, w),
        'input_gradient': lambda x, w, c: jax.vjp(lambda x: impl(options, x, w), x)[1](c),
        'weight_gradient': lambda x, w, c: jax.vjp(lambda w: impl(options, x, w), w)[1](c),
    }


def twice(function):
    """Returns a function of pairs of arrays, in a loop as over identical blocks or microbatches."""
    return lambda *pairs: jax.lax.map(lambda arrays: function(*arrays), pairs)


def measure(signature: ConvSignature, options: ConvOptions, x, w, args: argparse.Namespace) -> dict:
    """Returns {(impl, pass): (Times, processor seconds to compile)}."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = (jax.random.normal(k, s, args.dtype) for k, s in zip(keys, (x, w), strict=False))
    out = jax.eval_shape(lambda x, w: conv.xla(options, x, w), x, w)
    arrays = x, w, jax.random.normal(keys[2], out.shape, args.dtype)
    if args.loop:
        arrays = tuple(jnp.stack([array, array]) for array in arrays)
    programs, seconds = {}, {}
    for impl in conv.candidates(signature):
        for name, function in passes(impl, options).items():
            start = time.process_time()  # Compilation is the host's work on every platform.
            program = jax.jit(twice(function) if args.loop else function)
            programs[impl, name] = program.lower(*arrays).compile()
            seconds[impl, name] = time.process_time() - start
    runs = {key: functools.partial(program, *arrays) for key, program in programs.items()}
    times = timing.in_turns(runs, args.rounds, args.seconds)
    turns = 2 if args.loop else 1
    each = {key: timing.Times(*(value / turns for value in times[key])) for key in programs}
    return {key: (each[key], seconds[key]) for key in programs}


def fastest(measured: dict, impls: list[str], on_cpu: bool) -> Impl:
    """Returns the default implementation of each pass, or one that saves at least a tenth."""
    default = 'nhwc_grads' if on_cpu and 'nhwc_grads' in impls else 'xla'

    def cost(impl: str, name: str) -> float:
        times, compile_seconds = measured[impl, name]
        seconds = times.processor if on_cpu else times.best
        return (seconds + 1e-3 * compile_seconds) * (0.9 if impl == default else 1)

    return Impl(*(min(impls, key=lambda impl: cost(impl, name)) for name in PASSES))


def shorten(part: dict[ConvSignature, Impl]) -> dict[ConvSignature, Impl]:
    """Removes entries as long as every lookup still gives the same result."""
    short = dict(part)
    for signature in sorted(part):
        rest = {key: impl for key, impl in short.items() if key != signature}
        if all(conv.lookup(rest, key) == impl for key, impl in part.items()):
            short = rest
    return short


def table_source(entries: dict) -> str:
    """Returns the text of nfnets_jax/convolution/table.py for a table."""
    path = pathlib.Path(table.__file__)
    head = path.read_text().partition('TABLE:')[0]
    lines = ['TABLE: dict[str, dict[tuple[int, ...], tuple[str, str, str]]] = {']
    for platform, part in sorted(entries.items()):
        lines += [f"    '{platform}': {{"]
        lines += [f'        {tuple(key)}: {tuple(impl)},' for key, impl in sorted(part.items())]
        lines += ['    },']
    return head + '\n'.join([*lines, '}']) + '\n'


def main(argv=None):
    device = jax.devices()[0]
    on_cpu = device.platform == 'cpu'
    networks = NETWORKS['cpu' if on_cpu else 'gpu']
    batch, dtype = (8, 'float32') if on_cpu else (32, 'bfloat16')
    parser = timing.parser(__doc__, networks=networks, batch=batch, dtype=dtype, rounds=5)
    parser.add_argument(
        '--seconds', type=float, default=0.2, help='for each implementation and pass'
    )
    parser.add_argument('--loop', action='store_true', help='each pass in a loop of two rounds')
    parser.add_argument('--write', action='store_true', help='nfnets_jax/convolution/table.py')
    args = parser.parse_args(argv)

    settings = timing.about(**vars(args))
    print(f'{device.device_kind}, batch {args.batch}, {args.dtype}')
    print(f'{"kernel, stride, groups, in, out, positions":<42} {"implementation":<15}', end='')
    print(''.join(f'{name.replace("_", " "):>17}' for name in PASSES), f'{"compile s":>10}')
    rows, part = [], {}
    for signature, (network, *call) in sorted(signatures(args.networks, args.batch).items()):
        measured, impls = measure(signature, *call, args), conv.candidates(signature)
        part[signature] = chosen = fastest(measured, impls, on_cpu)
        for impl in impls:
            cells, row = '', {'network': network, **signature._asdict(), 'implementation': impl}
            for name, choice in zip(PASSES, chosen, strict=True):
                times, compile_seconds = measured[impl, name]
                ms = 1e3 * (times.processor if on_cpu else times.best)
                cells += f'{ms:15.3f} ' + ('*' if choice == impl else ' ')
                row |= {f'{name}_{key}': value for key, value in times._asdict().items()}
                row[f'{name}_compile'] = compile_seconds
            total = sum(measured[impl, name][1] for name in PASSES)
            print(f'{str(tuple(signature)):<42} {impl:<15}{cells} {total:10.2f}', flush=True)
            rows.append(row)
    timing.write(args.json, settings, rows)
    if args.write:
        platform = device.platform
        if platform == 'gpu':
            platform = 'cuda' if device.device_kind.startswith('NVIDIA') else 'rocm'
        text = table_source(table.TABLE | {platform: shorten(part)})
        files.atomic_write(table.__file__, text)


if __name__ == '__main__':
    with cli.guarded():
        main()
