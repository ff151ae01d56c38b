"""Lets `python benchmarks/dispatch.py` find the package that it measures, from any directory.

Python looks for imports beside a script first, so that it finds this file in place of the package,
which is one directory up. `python -m benchmarks.dispatch` in the repository does not pass here.
"""

import importlib
import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])
del sys.modules[__name__]
importlib.import_module(__name__)
