"""Instructions on registers alone: arithmetic, comparisons, bits, conversions, moves."""

import functools
import operator

import numpy as np

from ptx.decode import decoder
from ptx.numbers import TYPES, UNSIGNED, from_bfloat16, to_bfloat16
from ptx.text import Fault


def simple(code, one, function, kinds=None):
    """d = function(a, b, ..), operands all of the opcode's last type, or of `kinds`."""
    kinds = kinds or [one.opcode[-1]] * (len(one.operands) - 1)
    get = [code.source(text, kind) for text, kind in zip(one.operands[1:], kinds, strict=True)]
    put = code.target(one.operands[0])
    if len(get) == 2:
        first, second = get
        return lambda block, mask: put(block, function(first(block.values), second(block.values)), mask)
    return lambda block, mask: put(block, function(*(x(block.values) for x in get)), mask)


PLAIN = {
    "add": operator.add, "sub": operator.sub, "and": operator.and_, "or": operator.or_, "xor": operator.xor,
    "not": operator.invert, "neg": operator.neg, "abs": np.abs, "sqrt": np.sqrt, "ex2": np.exp2, "lg2": np.log2,
    "rsqrt": lambda x: (1 / np.sqrt(x)).astype(x.dtype), "rcp": lambda x: (1 / x).astype(x.dtype),
}  # fmt: skip


SHORT = ("f16", "bf16", "f16x2", "bf16x2")


def in_short(kind, function):
    """A function of float64 for floats of 16 bits, or for two of them in a register."""
    wide = from_bfloat16 if kind.startswith("bf16") else lambda bits: bits.view(np.float16)
    short = to_bfloat16 if kind.startswith("bf16") else lambda x: x.astype(np.float16).view(np.uint16)
    of_bits = lambda *bits: short(function(*(wide(x).astype("f8") for x in bits)))

    def of_pairs(*pairs):
        low, high = (of_bits(*((x >> np.uint32(by)).astype(np.uint16) for x in pairs)) for by in (0, 16))
        return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)

    if kind.endswith("x2"):
        return of_pairs
    return lambda *xs: of_bits(*(x.view(np.uint16) for x in xs)).view(TYPES[kind])


@decoder(*PLAIN)
def plain(code, one):
    function = PLAIN[one.opcode[0]]
    if one.opcode[-1] in SHORT and one.opcode[0] not in ("and", "or", "xor", "not"):
        if one.opcode[0] not in ("add", "sub", "neg", "abs"):
            raise Fault(f"the executor does not do this in 16 bits: {one.text}")
        function = in_short(one.opcode[-1], function)
    return simple(code, one, function)


@decoder("min", "max")
def least_or_most(code, one):
    """Floats: a NaN loses, but with .NaN."""
    largest = one.opcode[0] == "max"
    if one.opcode[-1].startswith("f") and "NaN" not in one.opcode:
        function = np.fmax if largest else np.fmin
    else:
        function = np.maximum if largest else np.minimum
    return simple(code, one, lambda *x: functools.reduce(function, x))


def product(opcode):
    """The function of mul and mad, and the type of its result."""
    kind = opcode[-1]
    if kind in SHORT:
        return in_short(kind, operator.mul), kind
    if kind.startswith("f"):
        return operator.mul, kind
    if "wide" in opcode:
        result = kind[0] + str(2 * int(kind[1:]))
        return lambda a, b: a.astype(TYPES[result]) * b.astype(TYPES[result]), result
    if "hi" in opcode:
        exact = lambda x: x.astype(object if x.itemsize == 8 else "i8")
        return lambda a, b: (exact(a) * exact(b) >> 8 * a.itemsize).astype(a.dtype), kind
    return operator.mul, kind


@decoder("mul")
def multiply(code, one):
    return simple(code, one, product(one.opcode)[0])


@decoder("mad")
def multiply_and_add(code, one):
    function, result = product(one.opcode)
    return simple(code, one, lambda a, b, c: function(a, b) + c, [one.opcode[-1]] * 2 + [result])


@decoder("fma")
def fused(code, one):
    """Rounded once for f32: the product is exact in float64. In float64 it is rounded twice."""
    if one.opcode[-1] in SHORT:
        return simple(code, one, in_short(one.opcode[-1], lambda a, b, c: a * b + c))
    dtype = TYPES[one.opcode[-1]]
    return simple(code, one, lambda a, b, c: (a.astype("f8") * b + c).astype(dtype))


@decoder("div", "rem")
def divide(code, one):
    """As in C: integers are cut towards zero."""
    if one.opcode[-1].startswith("f"):
        return simple(code, one, operator.truediv)

    def whole(a, b):
        if (b == 0).any():
            raise Fault("division of integers by zero")
        rest = np.fmod(a, b)
        return rest if one.opcode[0] == "rem" else (a - rest) // b

    return simple(code, one, whole)


@decoder("shl", "shr")
def shift(code, one):
    """Shifts by more than the width give zeros, or signs."""
    kind = one.opcode[-1]
    bits = 8 * TYPES[kind].itemsize
    left, keeps_sign = one.opcode[0] == "shl", kind.startswith("s")

    def function(x, by):
        n = np.minimum(by, bits - 1).astype(x.dtype)
        y = x << n if left else x >> n
        far = by >= bits
        return np.where(far, x.dtype.type(0), y) if not keeps_sign and far.any() else y

    return simple(code, one, function, [kind, "u32"])


@decoder("shf")
def funnel(code, one):
    """The upper word of (b, a) shifted left, or the lower one of it shifted right."""
    if "wrap" not in one.opcode:
        raise Fault(f"only shf.wrap can be executed: {one.text}")

    def function(low, high, by):
        pair, by = (high.astype("u8") << np.uint64(32)) | low, (by & np.uint32(31)).astype("u8")
        return (((pair << by) >> np.uint64(32)) if one.opcode[1] == "l" else (pair >> by)).astype("u4")

    return simple(code, one, function, ["u32"] * 3)


@decoder("bfe")
def extract(code, one):
    """`length` bits from `first` on, of 32 or 64; the sign is the highest of them."""
    kind = one.opcode[-1]
    bits = 8 * TYPES[kind].itemsize

    def function(x, first, length):
        if ((first + length > bits) | (length == 0)).any():
            raise Fault(f"bfe: bits {first[0]} to {first[0] + length[0]} of {bits}")
        up = (bits - first - length).astype(x.dtype)
        return (x << up) >> (bits - length).astype(x.dtype)

    return simple(code, one, function, [kind, "u32", "u32"])


@decoder("prmt")
def permute_bytes(code, one):
    """Each of four bytes is one of the eight of a and b, or eight times its sign."""
    if len(one.opcode) != 2:
        raise Fault(f"only prmt.b32 without a mode can be executed: {one.text}")

    def function(low, high, choice):
        pair, result = (high.astype("u8") << np.uint64(32)) | low, np.zeros_like(low)
        for i in range(4):
            nibble = (choice >> np.uint32(4 * i)).astype("u8") & np.uint64(15)
            byte = (pair >> (np.uint64(8) * (nibble & np.uint64(7)))) & np.uint64(255)
            byte = np.where(nibble > 7, np.where(byte > 127, np.uint64(255), np.uint64(0)), byte)
            result |= byte.astype("u4") << np.uint32(8 * i)
        return result

    return simple(code, one, function, ["u32"] * 3)


@decoder("lop3")
def any_logic(code, one):
    *operands, table = one.operands

    def function(a, b, c):
        result = np.zeros_like(a)
        for i in range(8):
            if int(table, 0) >> i & 1:
                result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return result

    get, put = [code.source(text, "b32") for text in operands[1:]], code.target(operands[0])
    return lambda block, mask: put(block, function(*(x(block.values) for x in get)), mask)


COMPARISONS = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge,
}  # fmt: skip


@decoder("setp")
def compare(code, one):
    """Comparisons of floats are false with a NaN; with a `u` they are true."""
    name, kind = one.opcode[1], one.opcode[-1]
    floats = kind.startswith("f")
    unordered = lambda a, b: np.isnan(a) | np.isnan(b)
    if name == "nan":
        function = unordered
    elif name == "num":
        function = lambda a, b: ~unordered(a, b)
    elif floats and name.endswith("u"):
        plain = COMPARISONS[name[:-1]]
        function = lambda a, b: plain(a, b) | unordered(a, b)
    elif floats and name == "ne":
        function = lambda a, b: (a != b) & ~unordered(a, b)
    else:
        function = COMPARISONS[name]
    if len(one.operands) == 3:
        return simple(code, one, function)
    combine = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}[one.opcode[2]]
    return simple(code, one, lambda a, b, p: combine(function(a, b), p), [kind, kind, "pred"])


@decoder("selp")
def select(code, one):
    kind = one.opcode[-1]
    return simple(code, one, lambda a, b, p: np.where(p, a, b), [kind, kind, "pred"])


@decoder("mov")
def move(code, one):
    """Also of the parts of a register, {low, high}."""
    to, source = one.operands
    kind = one.opcode[-1]
    if isinstance(to, tuple):
        part = f"b{8 * TYPES[kind].itemsize // len(to)}"
        get, put = code.source(source, kind), [code.target(text) for text in to]

        def unpack(block, mask):
            parts = np.ascontiguousarray(get(block.values)).view(TYPES[part]).reshape(-1, len(put))
            for i, one_put in enumerate(put):
                one_put(block, np.ascontiguousarray(parts[:, i]), mask)

        return unpack
    put = code.target(to)
    if isinstance(source, tuple):
        get = [code.source(text, f"b{8 * TYPES[kind].itemsize // len(source)}") for text in source]
        return lambda block, mask: put(block, np.stack([x(block.values) for x in get], 1).view(TYPES[kind])[:, 0], mask)
    get = code.source(source, kind)
    return lambda block, mask: put(block, get(block.values), mask)


ROUND = {"rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc, "rni": np.rint}


@decoder("cvt")
def convert(code, one):
    to, source = one.opcode[-2:]
    put = code.target(one.operands[0])
    get = [code.source(text, source) for text in one.operands[1:]]
    if to in ("bf16x2", "f16x2"):  # the first operand is the upper half
        half = to_bfloat16 if to == "bf16x2" else lambda x: x.astype("f2").view("u2")

        def pair(block, mask):
            high, low = (half(x(block.values)) for x in get)
            put(block, np.stack((low, high), 1).view("u4")[:, 0], mask)

        return pair
    if len(get) != 1 or "sat" in one.opcode:
        raise Fault(f"the executor has not this conversion: {one.text}")
    round_ = next((ROUND[name] for name in one.opcode if name in ROUND), None)
    function = functools.partial(_converted, to=to, source=source, round_=round_)
    return lambda block, mask: put(block, function(get[0](block.values)), mask)


def _converted(x, to, source, round_):
    if source == "bf16":
        x = from_bfloat16(x)
    if round_ is not None:
        x = round_(x)
    if to == "bf16":
        return to_bfloat16(x.astype("f4"))
    if to.startswith("f"):
        return x.astype(TYPES[to])
    if x.dtype.kind == "f":
        limits = np.iinfo(TYPES[to])
        return np.where(np.isnan(x), 0, np.clip(x, float(limits.min), float(limits.max))).astype(TYPES[to])
    return x.astype(TYPES[to]) if x.itemsize != TYPES[to].itemsize else x.view(UNSIGNED[x.itemsize])
