"""Compiled loops over chunks, bit for bit the plain definitions.

Each goes once over the models' stored values, in blocks that stay in cache: decode to float64, subtract the base,
keep, combine, add the base, round. `raw` is (addresses, array): where the values of each model begin, the base's last,
and an array of their dtype, bfloat16 as uint16. The loops do the same operations in the same order as the torch
functions beside which they stand. What those treat specially (NaN and infinity, values near the end of the output's
range) they only find: the caller then asks the plain definition. All in one file, as numba's cache sees the changes of
one file only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic, overload

BLOCK = 1024  # entries: a block of every model in float64 stays in the caches of a core
FEW = 32  # entries of a row up to which it is sorted by insertion: counting costs as much for few as for many

# What `ctl_merge.compiled` numbers so.
SUM, ANCHORED, AGREE = 0, 1, 2
WEIGHTED, UNWEIGHTED, COUNT = 0, 1, 2
BY_WEIGHTS, BY_COUNT, BY_NOTHING = 0, 1, 2


def _compiled(function: Any) -> Any:
    """Compiled on its first call, once for an installation where there is a folder that can keep it."""
    try:
        return njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # neither beside this file nor in the user's cache
        return njit(nogil=True, error_model="numpy")(function)


@intrinsic
def _bits_to_float32(context, bits):
    def generate(_, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _float32_to_bits(context, value):
    def generate(_, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def _float64_to_bits(context, value):
    def generate(_, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.uint64(types.float64), generate


@intrinsic
def _high_word(context, one, other):
    """The upper 64 bits of a product of two 64-bit words."""

    def generate(_, builder, signature, arguments):
        wide = [builder.zext(word, ir.IntType(128)) for word in arguments]
        product = builder.lshr(builder.mul(*wide), ir.Constant(ir.IntType(128), 64))
        return builder.trunc(product, ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


@intrinsic
def _pointer(context, address, like):
    """Where a row of the array's dtype lies."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(address, like), generate


@_compiled
def _row(raw, model, start, stop):
    """Entries [start, stop) of a model's stored values, `raw` being (addresses, an array of their dtype)."""
    addresses, like = raw
    return carray(_pointer(addresses[model] + start * like.itemsize, like), (stop - start,))


def _encode(merged: Any, base: Any, out: Any) -> bool:
    """Round the sum to the output's dtype; whether the largest number is reached, or anything is not finite."""
    raise NotImplementedError


@overload(_encode)
def _encode_overload(merged, base, out):
    if out.dtype == types.uint16:

        def encode(merged, base, out):
            bad = np.uint16(0)
            for i in range(out.size):
                bits = _float32_to_bits(np.float32(merged[i] + base[i]))
                half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
                rounded = np.uint16((bits + half) >> np.uint32(16))
                bad |= np.uint16((rounded & np.uint16(0x7FFF)) >= np.uint16(0x7F7F))
                out[i] = rounded
            return bad != 0
    else:

        def encode(merged, base, out):
            for i in range(out.size):
                out[i] = merged[i] + base[i]
            return False

    return encode


def _value(stored: Any) -> Any:
    """As float64."""
    raise NotImplementedError


@overload(_value)
def _value_overload(stored):
    if stored == types.uint16:
        return lambda stored: np.float64(_bits_to_float32(np.uint32(stored) << np.uint32(16)))
    return lambda stored: stored


def _end(stored: Any) -> Any:
    """Whether it is NaN or infinity, as a number as wide as it is itself: what is then added up stays vectorised."""
    raise NotImplementedError


@overload(_end)
def _end_overload(stored):
    if stored == types.uint16:
        return lambda stored: np.uint16((stored & np.uint16(0x7F80)) == np.uint16(0x7F80))
    end = np.uint64(0x7FF0000000000000)
    return lambda stored: np.uint64((_float64_to_bits(stored) & end) == end)


@_compiled
def _decode(row, out):
    """Stored values as float64; whether NaN or infinity is among them."""
    bad = _end(row[0])
    for i in range(row.size):
        bad |= _end(row[i])
        out[i] = _value(row[i])
    return bad != 0


@_compiled
def _decode_less(row, base, out):
    """As `_decode`, less the base."""
    bad = _end(row[0])
    for i in range(row.size):
        bad |= _end(row[i])
        out[i] = _value(row[i]) - base[i]
    return bad != 0


@_compiled
def _load(raw, with_base, start, stop, stack, base):
    """A block of every model into `stack`, less the base, which is the last of `raw`."""
    models = raw[0].size - 1 if with_base else raw[0].size
    count, bad = stop - start, False
    if with_base:
        bad |= _decode(_row(raw, models, start, stop), base[:count])
    for model in range(models):
        row = _row(raw, model, start, stop)
        bad |= (
            _decode_less(row, base[:count], stack[model, :count]) if with_base else _decode(row, stack[model, :count])
        )
    return bad


@_compiled
def decode_chunk(raw, with_base, start, stack):
    """The entries from `start` on in float64, less the base, which stays as the last row of `stack` (rows, n).

    True if NaN or infinity is among them.
    """
    models = raw[0].size - 1
    for begin in range(0, stack.shape[1], BLOCK):
        end = min(begin + BLOCK, stack.shape[1])
        piece = stack[:, begin:end]
        if _load(raw, with_base, start + begin, start + end, piece, piece[models]):
            return True
    return False


# ---- what is kept


@_compiled
def _decode_kept(row, base, above, upto, out):
    """As `_decode_less`, of entries with `above` < |d| <= `upto`; the others zero."""
    bad = _end(row[0])
    for i in range(row.size):
        bad |= _end(row[i])
        entry = _value(row[i]) - base[i]
        size = abs(entry)
        out[i] = entry if (size > above) & (size <= upto) else 0.0
    return bad != 0


@_compiled
def _load_kept(raw, with_base, start, stop, stack, base, above, upto):
    """As `_load`, of as many models as there are cuts, but entries that are trimmed are zero."""
    models, count, bad = above.size, stop - start, False
    base[:count] = 0.0
    if with_base:
        bad |= _decode(_row(raw, models, start, stop), base[:count])
    for model in range(models):
        row = _row(raw, model, start, stop)
        bad |= _decode_kept(row, base, above[model], upto[model], stack[model])
    return bad


@_compiled
def philox(key0, key1, counter, words):
    """Random words of 64 bits, four for each value of the counter: what NumPy's Philox gives. Fills `words`."""
    one, other = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
    for block in range(words.size // 4):
        a, b, c, d = np.uint64(counter + block), np.uint64(0), np.uint64(0), np.uint64(0)
        k0, k1 = key0, key1
        for _ in range(10):
            a, b, c, d = _high_word(other, c) ^ b ^ k0, other * c, _high_word(one, a) ^ d ^ k1, one * a
            k0 += np.uint64(0x9E3779B97F4A7C15)
            k1 += np.uint64(0xBB67AE8584CAA73B)
        words[4 * block], words[4 * block + 1], words[4 * block + 2], words[4 * block + 3] = a, b, c, d


@_compiled
def _drop(row, count, limit, words):
    """Entries whose 24 random bits are below `limit`, the others times zero."""
    for i in range(count):
        row[i] *= np.float64(np.int32(words[i] >> np.uint32(8)) < limit)


@_compiled
def _drop_by_place(row, count, places, least, spread, divides, words):
    """Entries whose number falls below `least` + `spread` times their place in their row, maybe divided by that."""
    for i in range(count):
        chance = places[i] * spread + least
        row[i] *= np.float64(np.float64(words[i] >> np.uint32(8)) * 2.0**-24 < chance)
        if divides:
            row[i] /= max(chance, 2.0**-24)


# ---- magnitudes as keys


def _key(value: Any, base: Any) -> Any:
    """The bits of |value - base| in float32, which order as it does."""
    raise NotImplementedError


@overload(_key)
def _key_overload(value, base):
    if value == types.uint16:
        # Rounded once: the difference of two bfloat16 rounds to the same float32 by way of float64.
        def key(value, base):
            one = _bits_to_float32(np.uint32(value) << np.uint32(16))
            other = _bits_to_float32(np.uint32(base) << np.uint32(16))
            return _float32_to_bits(one - other) & np.uint32(0x7FFFFFFF)
    else:

        def key(value, base):
            return _float32_to_bits(np.float32(abs(value - base)))

    return key


@_compiled
def _keys(raw, model, with_base, start, stop, keys):
    """Those of a block of one model, or of its difference from the base; whether NaN or infinity is among them."""
    row = _row(raw, model, start, stop)
    bad = _end(row[0])
    if with_base:
        base = _row(raw, raw[0].size - 1, start, stop)
        for i in range(row.size):
            bad |= _end(row[i]) | _end(base[i])
            keys[i] = _key(row[i], base[i])
    else:
        nothing = np.zeros(1, row.dtype)[0]
        for i in range(row.size):
            bad |= _end(row[i])
            keys[i] = _key(row[i], nothing)
    return bad != 0


# ---- places in a row


@_compiled
def _insert(words):
    """Sort what is nearly in order; false, with the same words in some order, where it is not."""
    left = 16 * words.size
    for i in range(1, words.size):
        word, free = words[i], i
        while free > 0 and words[free - 1] > word:
            words[free] = words[free - 1]
            free -= 1
        words[free] = word
        left -= i - free
        if left < 0:
            return False
    return True


@_compiled
def _by_buckets(words, other, counts, largest):
    """Bring words nearly in order, where their upper halves lie within eight octaves of the largest: into `other`."""
    buckets, fine = 1024, 0
    while buckets < words.size and buckets < counts.size:
        buckets, fine = 2 * buckets, fine + 1
    shift, last = np.uint32(16 - fine), np.int64(buckets - 1)
    least = np.int64(largest >> shift) - last
    found = counts[:buckets]
    found[:] = 0
    for i in range(words.size):
        found[max(np.int64(words[i] >> np.uint64(32) >> np.uint64(shift)) - least, 0)] += 1
    before = 0
    for bucket in range(buckets):
        found[bucket], before = before, before + found[bucket]
    for i in range(words.size):
        bucket = max(np.int64(words[i] >> np.uint64(32) >> np.uint64(shift)) - least, 0)
        other[found[bucket]] = words[i]
        found[bucket] += 1


@_compiled
def _by_digits(words, other, counts):
    """Sort by the upper half of each word, digit by digit; returns which of the two arrays holds them then."""
    digit, counts = np.uint64(255), counts[:1024].reshape(4, 256)
    counts[:] = 0
    for i in range(words.size):
        for place in range(4):
            counts[place, (words[i] >> np.uint64(32 + 8 * place)) & digit] += 1
    for place in range(4):
        shift, found = np.uint64(32 + 8 * place), counts[place]
        if found[(words[0] >> shift) & digit] == words.size:
            continue  # all have the same: as the last bits of most differences of two bfloat16
        before = 0
        for value in range(256):
            found[value], before = before, before + found[value]
        for i in range(words.size):
            value = (words[i] >> shift) & digit
            other[found[value]] = words[i]
            found[value] += 1
        words, other = other, words
    return words


@_compiled
def _places(keys, words, other, counts, places):
    """Each entry's place in its row by its key, as `ctl_merge.methods.della.rank_in_row` has it. Fills `places`."""
    width, position, largest = keys.size, np.uint64(0xFFFFFFFF), np.uint32(0)
    if width == 1:
        places[0] = 0.5
        return
    for i in range(width):
        largest = max(largest, keys[i])
        words[i] = np.uint64(keys[i]) << np.uint64(32) | np.uint64(i)
    if width > FEW:
        _by_buckets(words, other, counts, largest)
        words, other = other, words
    if not _insert(words):
        words = _by_digits(words, other, counts)
    start = 0
    while start < width:
        key, stop = words[start] >> np.uint64(32), start + 1
        while stop < width and words[stop] >> np.uint64(32) == key:
            stop += 1
        place = (start + (stop - start - 1) / 2) / (width - 1)
        for i in range(start, stop):
            places[words[i] & position] = place
        start = stop


@_compiled
def _rank(raw, with_base, start, stop, width, ranking):
    """The places in their rows of the entries [start, stop) of every model; whether NaN or infinity is among them.

    `ranking`: the places (models, span) float64, then memory to work in: keys (span,) uint32, two times (width,) uint64
    and counts (1024 × a power of two,) int64. A span is whole rows, at least one, and about a block if it is several.
    """
    places, keys, words, other, counts = ranking
    for model in range(places.shape[0]):
        if _keys(raw, model, with_base, start, stop, keys):
            return True
        for begin in range(0, stop - start, width):
            end = begin + width
            _places(keys[begin:end], words, other, counts, places[model, begin:end])
    return False


# ---- how the models are combined


@_compiled
def _sum(stack, count, factors, merged):
    """Σ f t, one model after the other."""
    first, factor = stack[0], factors[0]
    for i in range(count):
        merged[i] = first[i] * factor
    for model in range(1, factors.size):
        row, factor = stack[model], factors[model]
        for i in range(count):
            merged[i] += row[i] * factor


@_compiled
def _add(row, less, factor, first, merged):
    """`factor` times stored values less others in float64, added to `merged`, or in its place if it is the first.

    Whether NaN or infinity is among them.
    """
    bad = _end(row[0])
    if first:
        for i in range(row.size):
            bad |= _end(row[i])
            merged[i] = (_value(row[i]) - less[i]) * factor
    else:
        for i in range(row.size):
            bad |= _end(row[i])
            merged[i] += (_value(row[i]) - less[i]) * factor
    return bad != 0


@_compiled
def _sum_stored(raw, with_base, start, stop, factors, anchored, anchor, total, less, merged):
    """`_sum` of stored values of which nothing else is wanted, in fewer passes; without a base also an anchored one.

    That is Σ f t as f (t - anchor), plus the anchor times Σ f. Leaves the base, the anchor, or zeros in `less`.
    """
    models, count, bad = factors.size, stop - start, False
    if with_base or anchored:
        bad |= _decode(_row(raw, models if with_base else anchor, start, stop), less[:count])
    else:
        less[:count] = 0.0
    if anchored:
        for i in range(count):
            merged[i] = less[i] * total
    for model in range(models):
        if not anchored or model != anchor:
            row = _row(raw, model, start, stop)
            bad |= _add(row, less, factors[model], model == 0 and not anchored, merged)
    return bad


@_compiled
def _vote(stack, count, factors, elect, sign):
    """The elected sign of every entry, ±1; zero counts as +."""
    for i in range(count):
        sign[i] = 0.0
    for model in range(factors.size):
        row = stack[model]
        if elect == COUNT:
            for i in range(count):
                sign[i] += 1.0 if row[i] > 0 else (-1.0 if row[i] < 0 else 0.0)
        else:
            factor = factors[model] if elect == WEIGHTED else 1.0
            for i in range(count):
                sign[i] += row[i] * factor
    for i in range(count):
        sign[i] = -1.0 if sign[i] < 0 else 1.0


@_compiled
def _agree(stack, count, factors, elect, divide, merged, sign, share):
    """The mean over the models that have the elected sign; all factors are positive."""
    _vote(stack, count, factors, elect, sign)
    least = np.inf
    for model in range(factors.size):
        row, factor = stack[model], factors[model]
        part = factor if divide == BY_WEIGHTS else 1.0
        least = min(least, part)
        for i in range(count):
            entry = row[i] * sign[i]
            agrees = entry > 0
            weighed = (entry if agrees else 0.0) * factor
            counted = part if agrees else 0.0
            merged[i] = weighed if model == 0 else merged[i] + weighed
            share[i] = counted if model == 0 else share[i] + counted
    for i in range(count):
        merged[i] *= sign[i]
    if divide != BY_NOTHING:
        for i in range(count):  # max() would mind NaN, which takes four times as long
            part = share[i]
            merged[i] /= part if part > least else least


@_compiled
def merge_chunk(
    raw, with_base, first, width, out, scratch, words, ranking, combine, elect, divide, factors, anchor, total, scale,
    trims, above, upto, drops, keys, limits, divides, divisors, ranks, least, spreads, by_chance,
):  # fmt: skip
    """Merge a chunk of the stored values `raw`, a base as the last of them, into `out` (n,).

    `first` is the chunk's first entry in its tensor; where places in a row matter, it is whole rows of `width` entries.
    `scratch` (models + 4, BLOCK) float64, `words` (BLOCK / 2 + 4,) uint64 and `ranking` (see `_rank`) are memory to
    work in; for the rest see `ctl_merge.methods.fused`. True if the plain definition must decide.
    """
    models, places = factors.size, ranking[0]
    base, merged, sign, share = scratch[models], scratch[models + 1], scratch[models + 2], scratch[models + 3]
    span = places.shape[1] if ranks else BLOCK
    only_summed = combine == ANCHORED or not (trims or drops or divides or combine == AGREE)
    for begin in range(0, out.size, span):
        end = min(begin + span, out.size)
        if ranks and _rank(raw, with_base, begin, end, width, ranking):
            return True
        for start in range(begin, end, BLOCK):
            stop = min(start + BLOCK, end)
            count, skipped = stop - start, (first + start) % 8
            if only_summed:
                bad = _sum_stored(
                    raw, with_base, start, stop, factors, combine == ANCHORED, anchor, total, base, merged
                )
            elif trims:
                bad = _load_kept(raw, with_base, start, stop, scratch, base, above, upto)
            else:
                bad = _load(raw, with_base, start, stop, scratch, base)
            if bad:
                return True
            for model in range(0 if only_summed else models):
                row = scratch[model]
                if drops:
                    drawn = words[: (skipped + count + 7) // 8 * 4]
                    philox(keys[model, 0], keys[model, 1], (first + start) // 8, drawn)
                    numbers = drawn.view(np.uint32)[skipped:]
                    if ranks:
                        own = places[model, start - begin :]
                        _drop_by_place(row, count, own, least[model], spreads[model], by_chance, numbers)
                    else:
                        _drop(row, count, limits[model], numbers)
                if divides:
                    for i in range(count):
                        row[i] /= divisors[model]
            if combine == AGREE:
                _agree(scratch, count, factors, elect, divide, merged, sign, share)
            elif not only_summed:
                _sum(scratch, count, factors, merged)
            if scale != 1.0:
                for i in range(count):
                    merged[i] *= scale
            if not with_base:
                base[:count] = -0.0  # which leaves every number as it is, 0.0 would not
            if _encode(merged[:count], base[:count], out[start:stop]):
                return True
    return False


# ---- inner products


@_compiled
def _halved(terms, count):
    """The sum of so many numbers, a power of two, one half added to the other until one is left."""
    while count > 1:
        count //= 2
        for i in range(count):
            terms[i] += terms[i + count]
    return terms[0]


@_compiled
def _inner(one, other, terms):
    """Of a whole block."""
    half = BLOCK // 2
    for i in range(half):
        terms[i] = one[i] * other[i] + one[i + half] * other[i + half]
    return _halved(terms, half)


@_compiled
def add_products(raw, with_base, size, piece, squares, scratch, sums, total):
    """Inner products of the models, or only those of each with itself, added to the upper half of `total`.

    total (models, models). In the order of `ctl_merge.methods.angles.inner` for every `piece` of the `size` entries,
    and one piece after the other. `scratch` (models + 2, BLOCK) and `sums` (models, models, blocks of a piece, a power
    of two), float64, are memory to work in. True if NaN or infinity is among the entries.
    """
    models = total.shape[0]
    for begin in range(0, size, piece):
        end = min(begin + piece, size)
        sums[:] = 0.0
        for start in range(begin, end, BLOCK):
            stop = min(start + BLOCK, end)
            scratch[:models, stop - start :] = 0.0
            if _load(raw, with_base, start, stop, scratch, scratch[models]):
                return True
            for one in range(models):
                for other in range(one, one + 1 if squares else models):
                    terms = scratch[models + 1]
                    sums[one, other, (start - begin) // BLOCK] = _inner(scratch[one], scratch[other], terms)
        for one in range(models):
            for other in range(one, one + 1 if squares else models):
                total[one, other] += _halved(sums[one, other], sums.shape[2])
    return False


# ---- counting


@_compiled
def _pick(keys, begin, span, picked):
    """The keys that are less than `span` above `begin`, less that, to the front of `picked`; how many there are.

    A branch for each key would be foretold wrongly too often.
    """
    count = 0
    for i in range(keys.size):
        above = keys[i] - begin
        picked[count] = above
        count += above < span
    return count


@_compiled
def _count_and_pick(keys, found, begin, span, picked):
    """As `_pick`; counts the keys' upper halves as well, while whose numbers are on the way to memory there is time."""
    count = 0
    for i in range(keys.size):
        found[keys[i] >> np.uint32(16)] += 1
        above = keys[i] - begin
        picked[count] = above
        count += above < span
    return count


@_compiled
def count_upper(raw, with_base, size, keys, counts, first, near):
    """How often each upper half of the bits of |d| in float32 occurs, added to `counts` (models, 32768).

    Of `size` entries; `keys` (2, BLOCK) uint32 is memory to work in. How often each lower half occurs within the bins
    from `first` (models, k) on, as many as `near` (models, k, bins, 65536) has, is added to that.
    """
    ranks, span = first.shape[1], np.uint32(near.shape[2] << 16)
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        own = keys[0, : stop - start]
        for model in range(counts.shape[0]):
            if _keys(raw, model, with_base, start, stop, own):
                return True
            if ranks == 0:
                _count_and_pick(own, counts[model], np.uint32(0), np.uint32(0), keys[1])
            for rank in range(ranks):
                begin = np.uint32(first[model, rank] << 16)
                if rank == 0:
                    count = _count_and_pick(own, counts[model], begin, span, keys[1])
                else:
                    count = _pick(own, begin, span, keys[1])
                inside = near[model, rank].reshape(-1)
                for i in range(count):
                    inside[keys[1, i]] += 1
    return False


@_compiled
def count_lower(raw, with_base, size, keys, bins, counts):
    """Within each of the `bins` (models, k), how often each lower half occurs, added to `counts` (models, k, 65536)."""
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        own = keys[0, : stop - start]
        for model in range(counts.shape[0]):
            if _keys(raw, model, with_base, start, stop, own):
                return True
            for rank in range(bins.shape[1]):
                found = counts[model, rank]
                for i in range(_pick(own, np.uint32(bins[model, rank] << 16), np.uint32(1 << 16), keys[1])):
                    found[keys[1, i]] += 1
    return False
