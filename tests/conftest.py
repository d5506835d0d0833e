"""Tests run on one thread: small tensors are faster so, and every process rounds alike."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; inherited by commands under test
