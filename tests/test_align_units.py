"""What operations say of units: which are one, which stay, which move as a block."""

from __future__ import annotations

import torch

from zoo.fusion.align.units import Units


def test_units_that_meet_one_to_one_are_one() -> None:
    units = Units()
    one, other = units.fresh([3]), units.fresh([3])
    met = units.relate(one.view(1, 3, 1).expand(1, 3, 4), other.view(3, 1))
    assert met.shape == (1, 3, 4)
    assert [units.find(unit) for unit in one.tolist()] == [
        units.find(unit) for unit in other.tolist()]
    assert units.block(int(one[0])) == 0


def test_a_number_that_is_broadcast_stands_for_a_block() -> None:
    units = Units()
    heads, channels = units.fresh([2, 1]), units.fresh([2, 3])
    met = units.relate(heads, channels)
    assert torch.equal(met, channels)
    assert [units.block(unit) for unit in channels[1].tolist()] == [int(heads[1])] * 3


def test_a_repeated_unit_is_one_with_all_that_it_meets() -> None:
    units = Units()
    copied, others = units.fresh([2]).repeat(2), units.fresh([4])
    units.relate(copied, others)
    assert units.find(int(others[0])) == units.find(int(others[2])) == int(copied[0])
    assert units.block(int(others[0])) == 0


def test_a_free_unit_is_one_with_the_unit_that_it_meets_however_often() -> None:
    units = Units()
    channels = units.fresh([2]).view(2, 1).expand(2, 3).flatten()
    scales = units.fresh([6], free=True)
    assert torch.equal(units.relate(channels, scales), units.roots(channels))
    assert units.find(int(scales[0])) == units.find(int(scales[2])) != units.find(int(scales[3]))


def test_units_that_meet_several_each_stay() -> None:
    units = Units()
    one, other = units.fresh([3, 1]), units.fresh([2])
    met = units.relate(one, other)
    assert bool((met < 0).all())
    assert all(units.is_fixed(unit) for unit in [*one.flatten().tolist(), *other.tolist()])


def test_elements_that_stay_tell_units_apart() -> None:
    units = Units()
    channels = units.fresh([2, 3])
    units.relate(channels, units.still([1, 3]))
    colours = [[units.colour(unit) for unit in row] for row in channels.tolist()]
    assert colours[0] == colours[1]
    assert len(set(colours[0])) == 3
    alike = units.fresh([4])
    units.relate(alike.view(4, 1), units.still([1, 5]))  # all meet all
    assert {units.colour(unit) for unit in alike.tolist()} == {0}


def test_a_scale_on_something_that_stays_stays() -> None:
    units = Units()
    scale, still = units.fresh([3], free=True), units.still([3])
    assert bool((units.relate(scale, still) < 0).all())
    assert all(units.is_fixed(unit) for unit in scale.tolist())


def test_what_is_reduced_to_one_number_is_a_block() -> None:
    units = Units()
    channels = units.fresh([2, 3])
    sums = units.reduce(channels, [1], keepdim=False)
    assert [units.block(unit) for unit in channels[:, 0].tolist()] == sums.tolist()
    assert torch.equal(units.reduce(channels, [1], keepdim=True).flatten(), sums)
    assert bool((units.reduce(units.fresh([4]), [0], keepdim=True) < 0).all())  # one number of all
    spread = units.fresh([3]).view(3, 1).expand(3, 5)
    assert torch.equal(units.reduce(spread, [1], keepdim=False), spread[:, 0])


def test_blocks_that_cross_become_units() -> None:
    units = Units()
    grid = units.fresh([2, 3])
    units.relate(grid, units.fresh([3], free=True))  # a weight for each column
    assert bool((units.reduce(grid, [1], keepdim=False) < 0).all())
    assert torch.equal(units.roots(grid)[0], units.roots(grid)[1])
    assert len(set(units.roots(grid)[0].tolist())) == 3
