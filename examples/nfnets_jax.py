"""Makes `python examples/agc_optax.py` find the library, from any directory.

Python looks for imports beside a script first and finds this file in place of the package, which is
one directory up. `python -m examples.agc_optax` in the repository does not use it.
"""

import importlib
import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])
del sys.modules[__name__]
importlib.import_module(__name__)
