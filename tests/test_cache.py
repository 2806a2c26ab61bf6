"""The slabs of keys and values: what is there stays, what is not in use is zero."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from course_lib.engine import cache
from course_lib.engine.cache import FIRST, SPARE, GroupedCache, SlabLayer, new_cache


def columns(rows: int, count: int, value: float) -> torch.Tensor:
    return torch.full((rows, 2, count, 4), float(value))


def slab(rows: int = 3, length: int = 5) -> SlabLayer:
    """Column t of every row holds t + 1."""
    layer = SlabLayer()
    for t in range(length):
        layer.write(columns(rows, 1, t + 1), columns(rows, 1, -(t + 1)))
    return layer


def seen(layer: SlabLayer, row: int) -> list[float]:
    """What one head of a row reads, column by column; the values are minus the keys."""
    keys = layer.keys[row, 1, :, 2].tolist()
    assert layer.values[row, 0, :, 3].tolist() == [-key for key in keys]
    return keys


def test_columns_follow_one_another_and_the_rest_is_zero():
    layer = slab()
    assert layer.length == 5 <= layer.width <= 5 + SPARE
    for row in range(3):
        assert seen(layer, row) == [1, 2, 3, 4, 5] + [0] * (layer.width - 5)


def test_few_columns_are_spare_however_long_the_rows_grow():
    layer = slab(1, 300)
    assert layer.width - layer.length <= layer.length // 8
    assert seen(layer, 0)[:300] == list(range(1, 301))


def test_update_gives_what_transformers_expects_and_write_all_columns():
    layer = slab()
    keys, values = layer.update(columns(3, 2, 9), columns(3, 2, -9))
    assert keys.shape == values.shape == (3, 2, 7, 4)
    keys, _ = layer.write(columns(3, 1, 10), columns(3, 1, -10))
    assert keys.shape == (3, 2, layer.width, 4) and keys.is_contiguous()


def test_rows_that_join_end_in_the_same_column():
    layer, shorter, longer = slab(2, 6), slab(2, 3), slab(1, 8)
    layer.admit(shorter, torch.tensor([1, 0, 0]))
    assert layer.rows == 5 and layer.length == 6
    assert seen(layer, 4)[:6] == [0, 0, 0, 1, 2, 3]
    layer.admit(longer, torch.tensor([0]))
    assert layer.rows == 6 and layer.length == 8
    assert seen(layer, 0)[:8] == [0, 0, 1, 2, 3, 4, 5, 6]
    assert seen(layer, 5)[:8] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all(not any(seen(layer, row)[8:]) for row in range(6))


def test_a_row_that_takes_the_place_of_a_broken_one_inherits_nothing():
    """A NaN in a column that is masked would still reach the result."""
    layer = slab(3, 4)
    layer.keys[1], layer.values[1] = torch.nan, torch.nan
    layer.keep(torch.tensor([1]), torch.tensor([2]), 2)
    assert seen(layer, 1)[:4] == [1, 2, 3, 4] and not any(seen(layer, 1)[4:])
    layer.keys[0], layer.values[0] = torch.nan, torch.nan
    layer.keep(torch.tensor([0]), torch.tensor([1]), 1)
    layer.admit(slab(1, 2), torch.tensor([0]))
    assert seen(layer, 1)[:4] == [0, 0, 1, 2] and not any(seen(layer, 1)[4:])


def test_the_first_columns_can_be_forgotten():
    layer = slab(2, 6)
    layer.trim(2)
    assert layer.length == 4 and seen(layer, 1)[:4] == [3, 4, 5, 6]
    layer.write(columns(2, 1, 7), columns(2, 1, -7))
    assert seen(layer, 0)[:5] == [3, 4, 5, 6, 7]


def prompts(*rows: int) -> Cache:
    """A cache of one layer and so many columns, of which row r holds 10 r + 1, 10 r + 2 ..."""
    made, (count, length) = new_cache(), rows
    first = 10.0 * torch.arange(count).view(-1, 1, 1, 1)
    columns = (first + torch.arange(1, length + 1).view(1, 1, -1, 1)).expand(count, 2, length, 4)
    made.update(columns, -columns, 0)
    return made


def test_a_shared_prompt_is_each_rows_own_once_they_part():
    """Beyond the room for new columns at first, too."""
    grouped = GroupedCache(prompts(2, 3), 4)
    layer = grouped.layers[0]
    added = FIRST + SPARE + 1
    for t in range(added):
        layer.reserve()
        new = (100 * torch.arange(4.0) + t).view(4, 1, 1).expand(4, 2, 4)
        layer.write(new, -new)
    assert grouped.get_seq_length() == 3 + added <= 3 + layer.width
    assert not layer.keys[:, :, :, added:].any()
    for kept in ([0, 1, 2, 3], [3, 1]):
        apart = grouped.apart(torch.tensor(kept)).layers[0]
        assert apart.rows == len(kept) and apart.length == 3 + added
        for place, row in enumerate(kept):
            begins = [10 * (row // 2) + t for t in (1, 2, 3)]
            own = [100 * row + t for t in range(added)]
            assert seen(apart, place)[: 3 + added] == begins + own
            assert not any(seen(apart, place)[3 + added :])


def test_prompts_are_shared_by_equal_groups_where_that_saves_enough(monkeypatch):
    monkeypatch.setattr(cache, "SHARED_AT", 100)  # 2 prompts x 2 heads x 4 columns x 4 = 64 numbers
    two = prompts(2, 4)
    assert GroupedCache.pays(two, [0, 0, 0, 1, 1, 1])
    assert not GroupedCache.pays(two, [0, 0, 1, 1])  # 64
    assert not GroupedCache.pays(two, [0, 0, 0, 0, 1, 1])
    assert not GroupedCache.pays(two, [0, 1, 0, 1, 0, 1])
    assert not GroupedCache.pays(two, [0, 0, 0, 1, 1])
    assert not GroupedCache.pays(two, [0, 0, 0, 0, 0, 0])
