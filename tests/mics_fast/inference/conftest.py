"""An exported model, which tests only read or copy."""

from __future__ import annotations

import pytest

from mics_fast import export


@pytest.fixture(scope="session")
def exported(trained_run, tmp_path_factory):
    """The folder that ``export`` makes of ``trained_run``."""
    out = tmp_path_factory.mktemp("exported") / "model"
    export.main([str(trained_run), "--out", str(out), "--resamples", "5"])
    return out
