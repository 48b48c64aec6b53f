"""For all tests."""

import os

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: tests run side by side, no thread may spin


@pytest.fixture(scope="session", autouse=True)
def folder_of_this_run(tmp_path_factory):
    """Pytest's own folder is made before any test changes where temporary files go, and removes that place again."""
    return tmp_path_factory.getbasetemp()
