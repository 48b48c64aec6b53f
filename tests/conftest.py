"""For all tests."""

import os

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: tests run side by side, no thread may spin


@pytest.fixture(scope="session", autouse=True)
def folder_of_this_run(tmp_path_factory):
    """Pytest's own folder is made before any test changes where temporary files go, and removes that place again."""
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def one_thread():
    """Tiny matrices gain nothing from threads, and threads that wait for each other suffer on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
