"""Commands that train, evaluate and study the networks: `python -m experiments.train --help`."""

import sys

from nfnets_jax import extras

# What every command imports: found out without importing it, which takes seconds.
for _package in ('absl', 'ml_collections', 'haiku', 'grain', 'orbax'):
    if _line := extras.how_to_install(_package):
        print(f'error: {_line}', file=sys.stderr)
        sys.exit(2)
