"""Puts this folder on sys.path, so that tests can import its helpers (fake_data, helpers_*)."""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))
