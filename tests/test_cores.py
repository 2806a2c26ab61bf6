"""Small work takes one core, large work all, and nobody else's setting changes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from course_lib.engine.cores import LARGE, cores_for


@pytest.fixture
def two_allowed() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_allowed")
def test_small_work_takes_one_core_and_gives_the_others_back():
    with cores_for(1_000_000, 100):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError), cores_for(1_000_000, 100):
        _ = 1 / 0
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_allowed")
def test_large_work_takes_all_that_torch_may_use():
    with cores_for(1_000_000, int(LARGE / 1_000_000)):
        assert torch.get_num_threads() == 2
