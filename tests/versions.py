"""The installed version of jaxlib, and what tests may expect of it."""

import importlib.metadata

JAXLIB = tuple(map(int, importlib.metadata.version('jaxlib').split('.')[:3]))

# Sums on a CPU are a tenth as exact before: 1.4e-6 for 1.5e-7 over 1,568 numbers.
EXACT_SUMS = JAXLIB >= (0, 10, 2)
