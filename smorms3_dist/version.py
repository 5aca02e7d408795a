"""The version of the package, and the versions of Python that it is tested on.

launchers/setup.sh runs this file with whatever Python it finds: it is kept readable for old ones.
"""

__version__ = "0.1.0"

OLDEST_PYTHON = (3, 10)
# A newer one may well do. pyproject.toml has a classifier for each that is tested.
NEWEST_PYTHON = (3, 15)
TESTED_PYTHONS = "CPython {}.{} to {}.{}".format(*(OLDEST_PYTHON + NEWEST_PYTHON))
