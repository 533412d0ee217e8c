"""Puts the tests' shared helpers (python_tests/*.py) on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
