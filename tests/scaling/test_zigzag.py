"""Zigzag paths: permutations whose neighbours are neighbours, eight of them, paired by reversal."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scaling.layers.zigzag import PATHS, pyramid_path, zigzag

sides = st.integers(1, 9)
paths = st.integers(0, PATHS - 1)


@given(sides, sides, paths)
def test_a_path_visits_every_token_once(rows: int, columns: int, path: int) -> None:
    assert sorted(zigzag((rows, columns), path)) == list(range(rows * columns))


@given(sides, sides, paths)
def test_followers_on_the_path_are_neighbours_in_the_map(rows: int, columns: int, path: int) -> None:
    places = [divmod(index, columns) for index in zigzag((rows, columns), path)]
    for (row, column), (next_row, next_column) in itertools.pairwise(places):
        assert abs(row - next_row) + abs(column - next_column) == 1


@given(st.integers(2, 9), st.integers(2, 9))
def test_the_eight_are_distinct(rows: int, columns: int) -> None:
    assert len({zigzag((rows, columns), path) for path in range(PATHS)}) == PATHS


@given(sides, sides)
def test_paths_start_at_their_corners_and_along_their_lines(rows: int, columns: int) -> None:
    corners = [(0, 0), (rows - 1, 0), (rows - 1, columns - 1), (0, columns - 1)]
    for path in range(PATHS):
        places = [divmod(index, columns) for index in zigzag((rows, columns), path)]
        assert places[0] == corners[path // 2]
        line = columns if path % 2 == 0 else rows
        assert len({place[path % 2] for place in places[:line]}) == 1


@given(sides, sides, paths)
def test_half_a_turn_of_the_map_is_the_path_from_the_opposite_corner(
    rows: int, columns: int, path: int
) -> None:
    turned = tuple(rows * columns - 1 - index for index in zigzag((rows, columns), path))
    assert zigzag((rows, columns), (path + 4) % PATHS) == turned


@given(st.integers(1, 4).map(lambda n: 2 * n), st.integers(1, 4).map(lambda n: 2 * n), paths)
def test_backwards_on_an_even_map_is_the_path_from_where_it_ends(rows: int, columns: int, path: int) -> None:
    backwards = zigzag((rows, columns), path)[::-1]
    assert backwards in {zigzag((rows, columns), other) for other in range(PATHS) if other != path}


@given(sides, sides, paths)
def test_a_transposed_map_swaps_rows_and_columns(rows: int, columns: int, path: int) -> None:
    """Top right and bottom left change places; the corners on the diagonal stay."""
    transposed = [index % columns * rows + index // columns for index in zigzag((rows, columns), path)]
    swapped = {0: 1, 1: 0, 2: 7, 7: 2, 3: 6, 6: 3, 4: 5, 5: 4}[path]
    assert zigzag((columns, rows), swapped) == tuple(transposed)


@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=6), paths)
def test_a_pyramid_goes_through_its_maps_in_turn(sizes: list[tuple[int, int]], path: int) -> None:
    order, inverse = pyramid_path(sizes, path, torch.device("cpu"))
    x = torch.arange(sum(rows * columns for rows, columns in sizes)) + 100
    assert torch.equal(x[order][inverse], x)
    start = 0
    for rows, columns in sizes:
        part = order[start : start + rows * columns] - start
        assert tuple(part.tolist()) == zigzag((rows, columns), path)
        start += rows * columns


def test_a_map_is_gone_through_once_for_all_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random steps have thousands of schedules, made of few maps."""
    seen: list[tuple[int, int]] = []

    def counted(size: tuple[int, int], path: int) -> tuple[int, ...]:
        seen.append(size)
        return zigzag(size, path)

    monkeypatch.setattr("scaling.layers.zigzag.zigzag", counted)
    maps = [(31, side) for side in range(1, 9)]  # of a side that no other test has
    for sizes in itertools.combinations(maps, 4):
        pyramid_path(sizes, 0, torch.device("cpu"))
    assert seen
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("path", range(PATHS))
def test_a_two_by_three_map(path: int) -> None:
    assert zigzag((2, 3), path) == (
        (0, 1, 2, 5, 4, 3), (0, 3, 4, 1, 2, 5), (3, 4, 5, 2, 1, 0), (3, 0, 1, 4, 5, 2),
        (5, 4, 3, 0, 1, 2), (5, 2, 1, 4, 3, 0), (2, 1, 0, 3, 4, 5), (2, 5, 4, 1, 0, 3),
    )[path]  # fmt: skip
