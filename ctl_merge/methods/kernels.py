"""Compiled loops over chunks, bit for bit the plain definitions.

Each reads the stored values from memory once, in blocks that stay in cache: decode to float64, subtract the base,
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
def _product(context, one, other):
    """The upper and the lower 64 bits of a product of two 64-bit words, of one multiplication."""

    def generate(context, builder, signature, arguments):
        wide = [builder.zext(word, ir.IntType(128)) for word in arguments]
        product = builder.mul(*wide)
        upper = builder.lshr(product, ir.Constant(ir.IntType(128), 64))
        halves = [builder.trunc(part, ir.IntType(64)) for part in (upper, product)]
        return context.make_tuple(builder, signature.return_type, halves)

    return types.UniTuple(types.uint64, 2)(types.uint64, types.uint64), generate


@intrinsic
def _either(context, one, other):
    """The bits of two integers of one type together, in that type: the usual one is the widest, of fewer lanes."""

    def generate(_, builder, signature, arguments):
        return builder.or_(*arguments)

    return one(one, one), generate


@intrinsic
def _pointer(context, address, like):
    """Where a row of the array's dtype lies."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(address, like), generate


@intrinsic
def _prefetch(context, address):
    """Have the processor bring a line of memory into its caches, while it works on something else."""

    def generate(_, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(ir.IntType(8)), *[ir.IntType(32)] * 3])
        function = builder.module.declare_intrinsic("llvm.prefetch", [ir.PointerType(ir.IntType(8))], kind)
        place = builder.inttoptr(arguments[0], ir.PointerType(ir.IntType(8)))
        builder.call(function, [place, *(ir.Constant(ir.IntType(32), value) for value in (0, 2, 1))])
        return ir.Constant(ir.IntType(8).as_pointer(), None)

    return types.void(address), generate


@_compiled
def _ahead(raw, start, stop):
    """Have a block of every model on its way from memory, while the one before it is worked on."""
    addresses, like = raw
    for model in range(addresses.size):
        begin = addresses[model] + start * like.itemsize
        for at in range(begin - begin % 64, addresses[model] + stop * like.itemsize, 64):
            _prefetch(at)


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
            for i in range(out.size):
                bits = _float32_to_bits(np.float32(merged[i] + base[i]))
                half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
                out[i] = np.uint16((bits + half) >> np.uint32(16))
            bad = np.uint16(0)
            for i in range(out.size):
                bad = _either(bad, np.uint16((out[i] & np.uint16(0x7FFF)) >= np.uint16(0x7F7F)))
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
def _has_end(row):
    """Whether NaN or infinity is among stored values. A loop of its own has more lanes than those of float64."""
    bad = _end(row[0])
    for i in range(row.size):
        bad = _either(bad, _end(row[i]))
    return bad != 0


@_compiled
def _decode(row, out):
    """Stored values as float64."""
    for i in range(row.size):
        out[i] = _value(row[i])


@_compiled
def _decode_less(row, base, out):
    """As `_decode`, less the base."""
    for i in range(row.size):
        out[i] = _value(row[i]) - base[i]


@_compiled
def _any_end(raw, start, stop):
    """Whether NaN or infinity is in a block of any model, or of the base."""
    for model in range(raw[0].size):
        if _has_end(_row(raw, model, start, stop)):
            return True
    return False


@_compiled
def _load(raw, with_base, start, stop, stack, base):
    """A block of every model into `stack`, less the base, which is the last of `raw`."""
    models, count = raw[0].size - with_base, stop - start
    if with_base:
        _decode(_row(raw, models, start, stop), base[:count])
    for model in range(models):
        row, out = _row(raw, model, start, stop), stack[model, :count]
        if with_base:
            _decode_less(row, base[:count], out)
        else:
            _decode(row, out)


@_compiled
def decode_chunk(raw, with_base, start, stack):
    """The entries from `start` on in float64, less the base, which stays as the last row of `stack` (rows, n).

    True if NaN or infinity is among them.
    """
    models = raw[0].size - 1
    for begin in range(0, stack.shape[1], BLOCK):
        end = min(begin + BLOCK, stack.shape[1])
        piece = stack[:, begin:end]
        if _any_end(raw, start + begin, start + end):
            return True
        _ahead(raw, start + end, start + end + BLOCK)
        _load(raw, with_base, start + begin, start + end, piece, piece[models])
    return False


# ---- what is kept


@_compiled
def _decode_kept(row, base, above, upto, out):
    """As `_decode_less`, of entries with `above` < |d| <= `upto`; the others zero."""
    for i in range(row.size):
        entry = _value(row[i]) - base[i]
        size = abs(entry)
        out[i] = entry if (size > above) & (size <= upto) else 0.0


@_compiled
def _load_kept(raw, with_base, start, stop, stack, base, zero, above, upto):
    """As `_load`, of as many models as there are cuts, but entries that are trimmed are zero."""
    models, count, less = above.size, stop - start, base if with_base else zero
    if with_base:
        _decode(_row(raw, models, start, stop), base[:count])
    for model in range(models):
        _decode_kept(_row(raw, model, start, stop), less, above[model], upto[model], stack[model])


@_compiled
def philox(key0, key1, counter, words):
    """Random words of 64 bits, four for each value of the counter: what NumPy's Philox gives. Fills `words`."""
    one, other = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
    for block in range(words.size // 4):
        a, b, c, d = np.uint64(counter + block), np.uint64(0), np.uint64(0), np.uint64(0)
        k0, k1 = key0, key1
        for _ in range(10):
            (upper, lower), (upper1, lower1) = _product(one, a), _product(other, c)
            a, b, c, d = upper1 ^ b ^ k0, lower1, upper ^ d ^ k1, lower
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
    """Those of a block of one model, or of its difference from the base."""
    row = _row(raw, model, start, stop)
    if with_base:
        base = _row(raw, raw[0].size - 1, start, stop)
        for i in range(row.size):
            keys[i] = _key(row[i], base[i])
    else:
        nothing = np.zeros(1, row.dtype)[0]
        for i in range(row.size):
            keys[i] = _key(row[i], nothing)


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
    if _any_end(raw, start, stop):
        return True
    for model in range(places.shape[0]):
        _keys(raw, model, with_base, start, stop, keys)
        for begin in range(0, stop - start, width):
            end = begin + width
            _places(keys[begin:end], words, other, counts, places[model, begin:end])
    return False


# ---- how the models are combined


def _of(source: Any, model: Any, start: Any, stop: Any) -> Any:
    """A block of a model: of stored values, or of a stack (models, BLOCK) that holds just this block."""
    raise NotImplementedError


@overload(_of)
def _of_overload(source, model, start, stop):
    if isinstance(source, types.Array):
        return lambda source, model, start, stop: source[model, : stop - start]
    return lambda source, model, start, stop: _row(source, model, start, stop)


def _weighed(before: Any, rows: Any, factors: Any, less: Any, i: Any) -> Any:
    """Entry i of every row, less a number, times the row's factor, one after the other added to what was before."""
    raise NotImplementedError


@overload(_weighed)
def _weighed_overload(before, rows, factors, less, i):
    if len(rows) == 1:
        return lambda before, rows, factors, less, i: before + (_value(rows[0][i]) - less) * factors[0]

    def weighed(before, rows, factors, less, i):
        return _weighed(before + (_value(rows[0][i]) - less) * factors[0], rows[1:], factors[1:], less, i)

    return weighed


@_compiled
def _add_rows(rows, factors, arrays):
    less, merged = arrays
    for i in range(merged.size):
        merged[i] = _weighed(merged[i], rows, factors, less[i], i)


def _agreeing(before: Any, rows: Any, factors: Any, by_weights: Any, sign: Any, i: Any) -> Any:
    """The sum of entries i that have the sign, times it, and that of their parts, added to what was before."""
    raise NotImplementedError


@overload(_agreeing)
def _agreeing_overload(before, rows, factors, by_weights, sign, i):
    def one(before, rows, factors, by_weights, sign, i):
        entry = rows[0][i] * sign
        agrees = entry > 0
        part = factors[0] if by_weights else 1.0
        return before[0] + (entry if agrees else 0.0) * factors[0], before[1] + (part if agrees else 0.0)

    if len(rows) == 1:
        return one
    first = njit(one)
    return lambda before, rows, factors, by_weights, sign, i: _agreeing(
        first(before, rows, factors, by_weights, sign, i), rows[1:], factors[1:], by_weights, sign, i
    )


@_compiled
def _agree_rows(rows, factors, arrays):
    by_weights, sign, merged, share = arrays
    for i in range(merged.size):
        merged[i], share[i] = _agreeing((merged[i], share[i]), rows, factors, by_weights, sign[i], i)


def _rows_into(rows: Any, factors: Any, arrays: Any) -> Any:
    """`_add_rows` or `_agree_rows`: functions as arguments would not be kept in numba's cache."""
    raise NotImplementedError


@overload(_rows_into)
def _rows_into_overload(rows, factors, arrays):
    if len(arrays) == 2:
        return lambda rows, factors, arrays: _add_rows(rows, factors, arrays)
    return lambda rows, factors, arrays: _agree_rows(rows, factors, arrays)


@_compiled
def _in_threes(source, first, last, start, stop, factors, arrays):
    """Have blocks of the models [first, last) worked on, up to three in a pass: what is between stays in registers.

    Which of the two loops above, the arrays tell.
    """
    while first < last:
        one = _of(source, first, start, stop)
        if first + 1 == last:
            _rows_into((one,), (factors[first],), arrays)
            return
        two = _of(source, first + 1, start, stop)
        if first + 2 == last:
            _rows_into((one, two), (factors[first], factors[first + 1]), arrays)
            return
        three = _of(source, first + 2, start, stop)
        _rows_into((one, two, three), (factors[first], factors[first + 1], factors[first + 2]), arrays)
        first += 3


@_compiled
def _add(source, first, last, start, stop, factors, less, merged):
    """Σ f (t - less) of the models [first, last), one after the other added to what `merged` holds."""
    count = stop - start
    _in_threes(source, first, last, start, stop, factors, (less[:count], merged[:count]))


@_compiled
def _sum_stored(raw, with_base, start, stop, factors, anchored, anchor, total, base, less, merged):
    """Σ f t of stored values of which nothing else is wanted; without a base also an anchored one.

    That is Σ f t as f (t - anchor), plus the anchor times Σ f. Fills `base` if there is one; `less` is zeros, or memory
    for the anchor where there is one.
    """
    models, count = factors.size, stop - start
    merged[:count] = -0.0  # -0.0 + x is x, which 0.0 + x is not
    if with_base:
        less = base
        _decode(_row(raw, models, start, stop), less[:count])
    elif anchored:
        _decode(_row(raw, anchor, start, stop), less[:count])
        for i in range(count):
            merged[i] = less[i] * total
    for first, last in ((0, anchor), (anchor + 1, models)) if anchored else ((0, models), (models, models)):
        _add(raw, first, last, start, stop, factors, less, merged)


@_compiled
def _vote(stack, count, factors, elect, zero, sign):
    """The elected sign of every entry, ±1; zero counts as +. `factors` are ones where they do not count."""
    sign[:count] = 0.0
    if elect == COUNT:
        for model in range(factors.size):
            row = stack[model]
            for i in range(count):
                sign[i] += 1.0 if row[i] > 0 else (-1.0 if row[i] < 0 else 0.0)
    else:
        _add(stack, 0, factors.size, 0, count, factors, zero, sign)
    for i in range(count):
        sign[i] = -1.0 if sign[i] < 0 else 1.0


@_compiled
def _agree(stack, count, factors, divide, sign, merged, share):
    """The mean over the models that have the elected sign; all factors are positive."""
    by_weights, merged, share = divide == BY_WEIGHTS, merged[:count], share[:count]
    merged[:], share[:] = 0.0, 0.0
    _in_threes(stack, 0, factors.size, 0, count, factors, (by_weights, sign[:count], merged, share))
    if divide == BY_NOTHING:
        for i in range(count):
            merged[i] *= sign[i]
        return
    least = factors.min() if by_weights else 1.0
    for i in range(count):  # max() would mind NaN, which takes four times as long
        part = share[i]
        merged[i] = merged[i] * sign[i] / (part if part > least else least)


@_compiled
def merge_chunk(
    raw, with_base, first, width, out, scratch, words, ranking, combine, elect, divide, factors, anchor, total, scale,
    trims, above, upto, drops, keys, limits, divides, divisors, ranks, least, spreads, by_chance,
):  # fmt: skip
    """Merge a chunk of the stored values `raw`, a base as the last of them, into `out` (n,).

    `first` is the chunk's first entry in its tensor; where places in a row matter, it is whole rows of `width` entries.
    `scratch` (models + 5, BLOCK) float64, `words` (BLOCK / 2 + 4,) uint64 and `ranking` (see `_rank`) are memory to
    work in; for the rest see `ctl_merge.methods.fused`. True if the plain definition must decide.
    """
    models, places = factors.size, ranking[0]
    base, merged, sign, share = scratch[models], scratch[models + 1], scratch[models + 2], scratch[models + 3]
    zero, votes = scratch[models + 4], factors if elect == WEIGHTED else np.ones(models)
    zero[:] = 0.0
    if not with_base:
        base[:] = -0.0  # added to a number it leaves it as it is, 0.0 would not
    span = places.shape[1] if ranks else BLOCK
    only_summed = combine == ANCHORED or not (trims or drops or divides or combine == AGREE)
    for begin in range(0, out.size, span):
        end = min(begin + span, out.size)
        if ranks and _rank(raw, with_base, begin, end, width, ranking):
            return True
        for start in range(begin, end, BLOCK):
            stop = min(start + BLOCK, end)
            count, skipped = stop - start, (first + start) % 8
            if not ranks and _any_end(raw, start, stop):  # of whole rows it has been asked already
                return True
            _ahead(raw, stop, stop + BLOCK)
            if only_summed:
                _sum_stored(
                    raw, with_base, start, stop, factors, combine == ANCHORED, anchor, total, base, zero, merged
                )
            elif trims:
                _load_kept(raw, with_base, start, stop, scratch, base, zero, above, upto)
            else:
                _load(raw, with_base, start, stop, scratch, base)
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
                _vote(scratch, count, votes, elect, zero, sign)
                _agree(scratch, count, factors, divide, sign, merged, share)
            elif not only_summed:
                merged[:count] = -0.0
                _add(scratch, 0, models, 0, count, factors, zero, merged)
            if scale != 1.0:
                for i in range(count):
                    merged[i] *= scale
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
    """Of a whole block. The first three of its halvings are in one pass."""
    part = BLOCK // 8
    for i in range(part):
        a = one[i] * other[i] + one[i + 4 * part] * other[i + 4 * part]
        b = one[i + 2 * part] * other[i + 2 * part] + one[i + 6 * part] * other[i + 6 * part]
        c = one[i + part] * other[i + part] + one[i + 5 * part] * other[i + 5 * part]
        d = one[i + 3 * part] * other[i + 3 * part] + one[i + 7 * part] * other[i + 7 * part]
        terms[i] = (a + b) + (c + d)
    return _halved(terms, part)


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
            if _any_end(raw, start, stop):
                return True
            _ahead(raw, stop, stop + BLOCK)
            _load(raw, with_base, start, stop, scratch, scratch[models])
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
        if _any_end(raw, start, stop):
            return True
        _ahead(raw, stop, stop + BLOCK)
        for model in range(counts.shape[0]):
            _keys(raw, model, with_base, start, stop, own)
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
        if _any_end(raw, start, stop):
            return True
        _ahead(raw, stop, stop + BLOCK)
        for model in range(counts.shape[0]):
            _keys(raw, model, with_base, start, stop, own)
            for rank in range(bins.shape[1]):
                found = counts[model, rank]
                for i in range(_pick(own, np.uint32(bins[model, rank] << 16), np.uint32(1 << 16), keys[1])):
                    found[keys[1, i]] += 1
    return False
