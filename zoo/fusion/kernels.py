"""Compiled loops over the entries of tensors: one pass where PyTorch's operations need twenty.

They compute what the functions compute that call them, operation by operation and with the same
roundings, so that the bits of a result do not depend on whether numba is there. They run without
Python's lock, and keep what they need in between in blocks that fit into a core's first cache.
Import this through `zoo.fusion.compiled`. Tensors come as addresses of contiguous float32.
"""

# The types here are numba's, which mypy does not know.
# mypy: ignore-errors

from __future__ import annotations

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

BLOCK = 512
NOTED = 64
SUM, COUNT, UNWEIGHTED = 0, 1, 2
ALL_KEPT = 1 << 16


@intrinsic
def _floats(typing, address):
    """A pointer to the float32 at an address."""
    def build(context, builder, signature, arguments):
        pointer = cgutils.voidptr_t
        return builder.inttoptr(arguments[0], pointer)

    return types.voidptr(address), build


@intrinsic
def _fma(typing, a, b, c):
    """a·b + c with one rounding."""
    def build(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), build


@intrinsic
def _bits(typing, value):
    """The bits of a float32 as a whole number."""
    def build(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.int32))

    return types.int32(types.float32), build


if numba.config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")


def _kernel(function):
    loops = numba.njit(nogil=True, cache=True, error_model="numpy")(function)

    def call(*arguments):
        try:
            return loops(*arguments)
        except OSError:  # of the cache; what could not be kept is compiled
            return loops(*arguments)

    return call


@numba.njit
def _array(address, size):
    return numba.carray(_floats(address), size, np.float32)


@numba.njit
def _random16(first, second, place):
    """`zoo.fusion.randomness.random16` at one place of a stream with these keys."""
    x = np.uint32(place >> 1)
    x ^= first
    x ^= x >> np.uint32(16)
    x = np.uint32(x * np.uint32(0x7FEB352D))
    x ^= second
    x ^= x >> np.uint32(15)
    x = np.uint32(x * np.uint32(0x846CA68B))
    x ^= x >> np.uint32(16)
    return (x >> np.uint32(16 * (place & 1))) & np.uint32(0xFFFF)


@numba.njit
def _changes(start, member, ready, above, most, limit, keys, offset, factor, into):
    """Entries of a task vector, trimmed, dropped from and rescaled. ready: the member is one.
    above, most: magnitudes that stay are above the one and at most the other. offset: of the first
    entry in the stream."""
    zero, one = np.float32(0), np.float32(1)
    if ready:
        into[:] = member
    else:
        for i in range(len(into)):
            into[i] = member[i] - start[i]
    if not (above < 0 and most == np.inf):
        for i in range(len(into)):
            value = into[i]
            magnitude = abs(value)
            stays = (magnitude > above) | (magnitude != magnitude)
            left = value if stays else zero
            into[i] = left - (left if magnitude > most else zero)
    if limit < ALL_KEPT:
        for i in range(len(into)):
            kept = _random16(keys[0], keys[1], offset + i) < limit
            into[i] = into[i] * (one if kept else zero) * factor


@numba.njit
def _variances(members, begin, into, total):
    """`zoo.fusion.weights.task_vectors.variance` of a block. total: room for as many floats."""
    size = len(into)
    first = _array(members[0] + 4 * begin, size)
    into[:] = total[:] = np.float32(0)
    for j in range(1, len(members)):
        member = _array(members[j] + 4 * begin, size)
        for i in range(size):
            off = member[i] - first[i]
            into[i] = _fma(off, off, into[i])
            total[i] += off
    share = np.float32(-1 / len(members))
    for i in range(size):
        into[i] = _fma(share * total[i], total[i], into[i])


@_kernel
def multiply_and_add(a_at, b_at, c_at, count, factor, out_at):
    """a + factor·b·c, for a comparison with PyTorch's."""
    a, b, c = _array(a_at, count), _array(b_at, count), _array(c_at, count)
    out = _array(out_at, count)
    for i in range(count):
        out[i] = _fma(factor * b[i], c[i], a[i])


@_kernel
def elect(start_at, members, count, ready, above, most, limits, keys, offset, factors, weight,
          election, normalise, floor, scale, varying, out_at):
    """`zoo.fusion.weights.task_vectors.elected`, and θ₀ + λ times it. varying: the least variance
    over the members of the entries that stay, or -1 for all."""
    zero, one = np.float32(0), np.float32(1)
    blocks = np.empty((7, BLOCK), np.float32)
    for begin in range(0, count, BLOCK):
        size = min(BLOCK, count - begin)
        vector, total, positive = blocks[0, :size], blocks[1, :size], blocks[2, :size]
        ballot, shares, others = blocks[3, :size], blocks[4, :size], blocks[5, :size]
        start = _array(start_at + 4 * begin, size)
        if varying >= 0:
            chosen = blocks[6, :size]
            _variances(members, begin, chosen, total)
            for i in range(size):
                chosen[i] = one if chosen[i] >= varying else zero
        for j in range(len(members)):
            _changes(start, _array(members[j] + 4 * begin, size), ready, above[j], most[j],
                     limits[j], keys[j], offset + begin, factors[j], vector)
            if varying >= 0:
                for i in range(size):
                    vector[i] *= chosen[i]
            share = weight[j]
            if j == 0:
                total[:] = positive[:] = ballot[:] = -zero
                shares[:] = others[:] = zero
            if election == UNWEIGHTED:
                for i in range(size):
                    ballot[i] += vector[i]
            if share != one:
                for i in range(size):
                    vector[i] *= share
            if election == COUNT:
                for i in range(size):
                    ballot[i] += ((one if vector[i] > zero else zero)
                                  - (one if vector[i] < zero else zero))
            for i in range(size):
                value = vector[i]
                total[i] += value
                positive[i] += zero if value <= zero else value
            if normalise:
                for i in range(size):
                    value = vector[i]
                    shares[i] += share if value > zero else zero
                    others[i] += share if value < zero else zero
        if election == SUM:
            ballot[:] = total
        for i in range(size):
            negative = total[i] - positive[i]
            picked = positive[i] if ballot[i] >= zero else negative
            vector[i] = picked + zero * (positive[i] - negative)
        if normalise:
            for i in range(size):
                shares[i] = shares[i] if ballot[i] >= zero else others[i]
            if floor > zero:
                for i in range(size):
                    vector[i] /= floor if floor > shares[i] else shares[i]
            else:
                for i in range(size):
                    vector[i] /= shares[i] + (one if shares[i] == zero else zero)
        out = _array(out_at + 4 * begin, size)
        for i in range(size):
            out[i] = _fma(vector[i], scale, start[i])


@_kernel
def add_up(start_at, members, count, ready, above, most, limits, keys, offset, factors, weight,
           whole, scale, out_at):
    """θ₀ + λ/whole times `zoo.fusion.weights.task_vectors.summed`."""
    blocks = np.empty((2, BLOCK), np.float32)
    for begin in range(0, count, BLOCK):
        size = min(BLOCK, count - begin)
        vector, total = blocks[0, :size], blocks[1, :size]
        start, out = _array(start_at + 4 * begin, size), _array(out_at + 4 * begin, size)
        for j in range(len(members)):
            _changes(start, _array(members[j] + 4 * begin, size), ready, above[j], most[j],
                     limits[j], keys[j], offset + begin, factors[j], vector)
            share = weight[j]
            if j == 0:
                for i in range(size):
                    total[i] = vector[i] * share
            else:
                for i in range(size):
                    total[i] = _fma(vector[i], share, total[i])
        if whole != 1:
            for i in range(size):
                total[i] /= whole
        for i in range(size):
            out[i] = _fma(total[i], scale, start[i])


@_kernel
def note_changes(start_at, member_at, count, low, high, inside):
    """How many |θ − θ₀| lie above a bracket and how many inside, which it writes down."""
    values = np.empty(NOTED, np.float32)
    above = noted = 0
    for begin in range(0, count, NOTED):
        size = min(NOTED, count - begin)
        start, member = _array(start_at + 4 * begin, size), _array(member_at + 4 * begin, size)
        more = found = np.int32(0)
        for i in range(size):
            value = abs(member[i] - start[i])
            values[i] = value
            more += np.int32(value > high)
            found += np.int32(value >= low)
        above += more
        if found > more:
            for i in range(size):
                inside[noted] = values[i]
                noted += (values[i] >= low) & (values[i] <= high)
    return above, noted


@_kernel
def note_variances(members, count, low, high, inside):
    """How many variances over the members are not zero, how many lie above a bracket, and how many
    inside, which it writes down."""
    values, room = np.empty(NOTED, np.float32), np.empty(NOTED, np.float32)
    there = above = noted = 0
    for begin in range(0, count, NOTED):
        size = min(NOTED, count - begin)
        block = values[:size]
        _variances(members, begin, block, room[:size])
        some = more = found = np.int32(0)
        for i in range(size):
            some += np.int32(block[i] != 0)
            more += np.int32(block[i] > high)
            found += np.int32((block[i] >= low) & (block[i] != 0))
        there += some
        above += more
        if found > more:
            for i in range(size):
                inside[noted] = block[i]
                noted += (block[i] >= low) & (block[i] <= high) & (block[i] != 0)
    return there, above, noted


@_kernel
def add_squares(start_at, members, count, varying, sums):
    """Add the squares of each task vector's entries that vary as much (see `elect`) to BLOCK sums,
    [members, BLOCK], one for every BLOCK-th entry."""
    zero, one = np.float32(0), np.float32(1)
    blocks = np.empty((2, BLOCK), np.float32)
    for begin in range(0, count, BLOCK):
        size = min(BLOCK, count - begin)
        vector, chosen = blocks[0, :size], blocks[1, :size]
        start = _array(start_at + 4 * begin, size)
        if varying >= 0:
            _variances(members, begin, chosen, vector)
            for i in range(size):
                chosen[i] = one if chosen[i] >= varying else zero
        else:
            chosen[:] = one
        for j in range(len(members)):
            member = _array(members[j] + 4 * begin, size)
            lanes = sums[j, :size]
            for i in range(size):
                value = (member[i] - start[i]) * chosen[i]
                lanes[i] += np.float64(value * value)


@_kernel
def magnitude_keys(vector_at, keys):
    """For each entry of rows one number that sorts like its magnitude and then its place."""
    height, width = keys.shape
    for row in range(height):
        vector = _array(vector_at + 4 * row * width, width)
        for i in range(width):
            keys[row, i] = (np.int64(_bits(abs(vector[i]))) << 32) | i


@_kernel
def prune(vector_at, order, spread, least, keys, offset, rescale):
    """Drop entries of rows by the chance of their rank, which `order` tells, in place."""
    zero, one = np.float32(0), np.float32(1)
    height, width = order.shape
    chances = np.empty(width, np.float32)
    for rank in range(width):
        chances[rank] = np.float32(rank) / np.float32(width - 1) * spread + least
    for row in range(height):
        vector = _array(vector_at + 4 * row * width, width)
        for rank in range(width):
            place = order[row, rank] & 0xFFFFFFFF
            bits = _random16(keys[0], keys[1], offset + row * width + place)
            drawn = np.float32(bits) * np.float32(2.0**-16) + np.float32(2.0**-17)
            chance = chances[rank]
            value = vector[place] * (one if drawn < chance else zero)
            vector[place] = value / chance if rescale else value
