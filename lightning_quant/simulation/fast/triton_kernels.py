"""Fake quantization for GPUs, in Triton: what ``fake_quantize.cpp`` computes, in one launch per direction.

Numbers come in and go out in the tensor's own type, and are computed with in float32: the same bits as on the CPU where
the type is float32. Every sum is taken in a fixed order, so that a run can be repeated.

Importing this module imports Triton, which comes with PyTorch for CUDA. With ``TRITON_INTERPRET=1`` the kernels run on
the CPU, for tests.
"""

# Triton reads annotations and globals of a kernel itself.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return, no-untyped-call"

import triton
import triton.language as tl

# What a forward pass saves for its backward pass, see `gpu.Kept`.
NOTHING = tl.constexpr(0)
INPUT = tl.constexpr(1)
CODES = tl.constexpr(2)
BITS = tl.constexpr(3)

# By `kernels.Activation`.
RELU = tl.constexpr(1)
HARDSWISH = tl.constexpr(2)
RELU6 = tl.constexpr(3)
SILU = tl.constexpr(4)

# Codes of values outside of the range, and of one inside to which the activation gives no gradient. Those of the
# others are their rounding error times CODE_SCALE: half a step, and a little more where 16 bits leave a float no room.
ABOVE = tl.constexpr(127)
BELOW = tl.constexpr(-128)
CUT_OFF = tl.constexpr(126)
CODE_SCALE = tl.constexpr(240.0)
NAN_STAYS = tl.constexpr(tl.PropagateNan.ALL)

# Adding it leaves no room for a fraction. Numbers beyond 2^22 lose more, which are outside of every grid there is.
NO_FRACTION = tl.constexpr(12582912.0)
# The interpreter rounds a fused product and sum twice.
IS_FUSED = tl.constexpr(not triton.knobs.runtime.interpret)


# Read one by one, wherever they are.
ENDS = ["low_ptr", "high_ptr"]


@triton.jit
def nearest(x):
    """Round half to even; NaN stays NaN."""
    return (x + NO_FRACTION) - NO_FRACTION


@triton.jit
def quotient(x, by, inverse):
    """Compute x / by, rounded as in IEEE 754; Triton's own correct division takes longer than memory does.

    Two corrections of the product with the rounded reciprocal are exact but for results without a normal number's
    precision (Markstein 1990, "Computation of elementary functions on the IBM RISC System/6000 processor").
    """
    if IS_FUSED:
        close = x * inverse
        better = tl.fma(tl.fma(-close, by, x), inverse, close)
        better = tl.fma(tl.fma(-better, by, x), inverse, better)
        result = tl.where(tl.abs(close) < 1e30, better, close)  # infinity corrected would be NaN
    else:
        result = tl.div_rn(x, by)
    return result


@triton.jit
def grid_of(low, high, qmin, qmax, smallest, SYMMETRIC: tl.constexpr):
    """Return scale and offset of a range, and both before clamping: see ``Encoding`` in ``fake_quantize.cpp``."""
    raw = tl.div_rn(high - low, qmax - qmin)
    scale = tl.where(tl.abs(raw) < smallest, smallest, tl.abs(raw))
    free = nearest(tl.div_rn(low, scale)) - qmin
    if SYMMETRIC:
        offset = -nearest((qmin + qmax) * 0.5 + low * 0.0)  # of the type of `low`
    else:
        offset = tl.where(free < -qmax, -qmax, free)
        offset = tl.where(offset > -qmin, -qmin, offset)
    return scale, offset, raw, free


@triton.jit
def clipped(x, lowest, highest):
    """Clamp between two bounds; NaN stays NaN."""
    return tl.minimum(tl.maximum(x, lowest, propagate_nan=NAN_STAYS), highest, propagate_nan=NAN_STAYS)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """Compute the activation in front of the rounding."""
    if ACTIVATION == RELU:
        x = tl.maximum(x, 0.0, propagate_nan=NAN_STAYS)
    if ACTIVATION == RELU6:
        x = clipped(x, 0.0, 6.0)
    if ACTIVATION == HARDSWISH:
        x = quotient(x * clipped(x + 3.0, 0.0, 6.0), 6.0, 1 / 6)
    if ACTIVATION == SILU:
        x = x / (1.0 + tl.exp(-x))
    return x


@triton.jit
def passes(x, ACTIVATION: tl.constexpr):
    """Return where an activation passes its gradient unchanged; elsewhere it is zero. Not for hardswish and SiLU."""
    through = x == x
    if ACTIVATION == RELU:
        through = x > 0
    if ACTIVATION == RELU6:
        through = (x > 0) & (x < 6)
    return through


@triton.jit
def activation_gradient(grad, x, ACTIVATION: tl.constexpr):
    if ACTIVATION == RELU:
        grad = tl.where(x <= 0, 0.0, grad)
    if ACTIVATION == RELU6:
        grad = tl.where((x <= 0) | (x >= 6), 0.0, grad)
    if ACTIVATION == HARDSWISH:
        slope = quotient(x, 3.0, 1 / 3) + 0.5
        grad = tl.where(x <= -3, 0.0, tl.where(x >= 3, grad, grad * slope))
    if ACTIVATION == SILU:
        gate = 1.0 / (1.0 + tl.exp(-x))
        grad = grad * gate * (1.0 + x * (1.0 - gate))
    return grad


@triton.jit
def on_grid(value, scale, inverse, offset, qmin, qmax, LEARNED: tl.constexpr):
    """Return the clipped integer, the rounded one without offset, and whether the value is above or inside."""
    if LEARNED:
        rounded = nearest(quotient(value, scale, inverse))
    else:
        rounded = nearest(value * inverse)  # as PyTorch's fake_quantize does, which AIMET calls there
    exact = rounded - offset
    q = clipped(exact, qmin, qmax)
    return q, rounded, exact > qmax, q == exact


@triton.jit(do_not_specialize_on_alignment=ENDS)
def forward_kernel(
    x_ptr, y_ptr, kept_ptr, low_ptr, high_ptr, n, qmin, qmax, smallest,
    SYMMETRIC: tl.constexpr, LEARNED: tl.constexpr, ACTIVATION: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fake-quantize the activation of x into y with one range, along the memory of both."""
    scale, offset, raw, free = grid_of(tl.load(low_ptr), tl.load(high_ptr), qmin, qmax, smallest, SYMMETRIC)
    inverse = tl.div_rn(1.0, scale)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    here = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    left = tl.minimum(n - start, BLOCK).to(tl.int32)
    mask = here < left
    x = tl.load(x_ptr + start + here, mask=mask, other=0.0).to(tl.float32)
    value = activated(x, ACTIVATION)
    q, rounded, above, inside = on_grid(value, scale, inverse, offset, qmin, qmax, LEARNED)
    tl.store(y_ptr + start + here, ((q + offset) * scale).to(y_ptr.dtype.element_ty), mask=mask)
    if KEPT == CODES:
        error = tl.fma(rounded, scale, -value) * (inverse * CODE_SCALE)
        # its nearest integer is what the last byte of the sum says
        code = (error + NO_FRACTION).to(tl.int32, bitcast=True).to(tl.int8)
        code = tl.where(passes(x, ACTIVATION), code, CUT_OFF)
        code = tl.where(inside, code, tl.where(above, ABOVE, BELOW))
        tl.store(kept_ptr + start + here, code.to(tl.int8), mask=mask)
    if KEPT == BITS:
        bit = (inside & passes(x, ACTIVATION)).to(tl.int32) << tl.arange(0, 8)[None, :]
        byte = start // 8 + tl.arange(0, BLOCK // 8)
        tl.store(kept_ptr + byte, tl.sum(bit, axis=1).to(tl.uint8), mask=tl.arange(0, BLOCK // 8) * 8 < left)


@triton.jit
def backward_bits_kernel(grad_ptr, bits_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Compute the gradient of x with frozen ranges: that of y where the bit is set."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    here = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    left = tl.minimum(n - start, BLOCK).to(tl.int32)
    byte = tl.load(bits_ptr + start // 8 + tl.arange(0, BLOCK // 8), mask=tl.arange(0, BLOCK // 8) * 8 < left, other=0)
    bit = (byte.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1
    grad = tl.load(grad_ptr + start + here, mask=here < left, other=0.0)
    tl.store(out_ptr + start + here, tl.where(bit != 0, grad, 0.0), mask=here < left)


@triton.jit(do_not_specialize=["turns"], do_not_specialize_on_alignment=ENDS)
def backward_codes_kernel(
    grad_ptr, codes_ptr, out_ptr, sums_ptr, low_ptr, high_ptr, n, turns, qmin, qmax, smallest,
    SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of x with learned ranges, and this program's part of the sums for the range's gradient.

    A program takes ``turns`` blocks, as many apart as there are programs.
    """
    scale, offset, raw, free = grid_of(tl.load(low_ptr), tl.load(high_ptr), qmin, qmax, smallest, SYMMETRIC)
    lowest, highest = qmin + offset, qmax + offset
    by_scale = tl.zeros([BLOCK], tl.float32)
    by_offset = tl.zeros([BLOCK], tl.float32)
    here = tl.arange(0, BLOCK)
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    for turn in range(0, turns):
        start = (program + turn * programs) * BLOCK
        mask = here < tl.minimum(n - start, BLOCK).to(tl.int32)
        given = tl.load(grad_ptr + start + here, mask=mask, other=0.0)
        code = tl.load(codes_ptr + start + here, mask=mask, other=0).to(tl.int32)
        inside = (code != ABOVE) & (code != BELOW)
        cut_off = code == CUT_OFF
        tl.store(out_ptr + start + here, tl.where(inside & (code != CUT_OFF), given, 0.0), mask=mask)
        grad = given.to(tl.float32)
        error = tl.where(cut_off, 0.0, code.to(tl.float32) * (1.0 / CODE_SCALE))
        by_scale += grad * tl.where(inside, error, tl.where(code == ABOVE, highest, lowest))
        by_offset += tl.where(inside, 0.0, grad)
    tl.store(sums_ptr + 2 * program, tl.sum(by_scale, axis=0))
    tl.store(sums_ptr + 2 * program + 1, tl.sum(by_offset, axis=0))


@triton.jit(do_not_specialize=["turns"], do_not_specialize_on_alignment=ENDS)
def backward_input_kernel(
    grad_ptr, x_ptr, out_ptr, sums_ptr, low_ptr, high_ptr, n, turns, qmin, qmax, smallest,
    SYMMETRIC: tl.constexpr, LEARNED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the same where the input itself was saved."""
    scale, offset, raw, free = grid_of(tl.load(low_ptr), tl.load(high_ptr), qmin, qmax, smallest, SYMMETRIC)
    inverse = tl.div_rn(1.0, scale)
    by_scale = tl.zeros([BLOCK], tl.float32)
    by_offset = tl.zeros([BLOCK], tl.float32)
    here = tl.arange(0, BLOCK)
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    for turn in range(0, turns):
        start = (program + turn * programs) * BLOCK
        mask = here < tl.minimum(n - start, BLOCK).to(tl.int32)
        grad = tl.load(grad_ptr + start + here, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + start + here, mask=mask, other=0.0).to(tl.float32)
        value = activated(x, ACTIVATION)
        q, rounded, above, inside = on_grid(value, scale, inverse, offset, qmin, qmax, LEARNED)
        out = activation_gradient(tl.where(inside, grad, 0.0), x, ACTIVATION)
        tl.store(out_ptr + start + here, out.to(out_ptr.dtype.element_ty), mask=mask)
        if LEARNED:
            by_scale += grad * tl.where(inside, tl.fma(rounded, scale, -value) * inverse, q + offset)
            by_offset += tl.where(inside, 0.0, grad)
    if LEARNED:
        tl.store(sums_ptr + 2 * program, tl.sum(by_scale, axis=0))
        tl.store(sums_ptr + 2 * program + 1, tl.sum(by_offset, axis=0))


@triton.jit
def range_gradients(by_scale, by_offset, low, high, qmin, qmax, smallest, SYMMETRIC: tl.constexpr):
    """Return the gradients of both ends: scale = |max - min| / steps, offset = round(min / scale) - qmin.

    Rounding passes the gradient straight through.
    """
    scale, offset, raw, free = grid_of(low, high, qmin, qmax, smallest, SYMMETRIC)
    sign = tl.where(tl.abs(raw) > smallest, tl.where(raw > 0, 1.0, -1.0), 0.0)
    if SYMMETRIC:
        by_offset = by_offset * 0.0
    else:  # a bound gives no gradient to what lies on it
        by_offset = tl.where((free > -qmax) & (free < -qmin), by_offset * scale, 0.0)
    by_scale = by_scale - by_offset * low / (scale.to(tl.float64) * scale)
    by_high = by_scale * sign / (qmax - qmin)
    return by_offset / scale - by_high, by_high


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=ENDS)
def finish_kernel(
    sums_ptr, low_ptr, high_ptr, low_grad_ptr, high_grad_ptr, count, qmin, qmax, smallest,
    SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up the sums of the programs, and compute the gradients of the ends of the range."""
    here = tl.arange(0, BLOCK)
    by_scale = tl.sum(tl.load(sums_ptr + 2 * here, mask=here < count, other=0.0).to(tl.float64), axis=0)
    by_offset = tl.sum(tl.load(sums_ptr + 2 * here + 1, mask=here < count, other=0.0).to(tl.float64), axis=0)
    low, high = tl.load(low_ptr), tl.load(high_ptr)
    by_low, by_high = range_gradients(by_scale, by_offset, low, high, qmin, qmax, smallest, SYMMETRIC)
    tl.store(low_grad_ptr, by_low.to(tl.float32))
    tl.store(high_grad_ptr, by_high.to(tl.float32))


@triton.jit(do_not_specialize_on_alignment=ENDS)
def forward_rows_kernel(
    x_ptr, y_ptr, low_ptr, high_ptr, length, qmin, qmax, smallest,
    SYMMETRIC: tl.constexpr, LEARNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fake-quantize x [rows, length] with a range per row: one program per row."""
    row = tl.program_id(0)
    scale, offset, raw, free = grid_of(tl.load(low_ptr + row), tl.load(high_ptr + row), qmin, qmax, smallest, SYMMETRIC)
    inverse = tl.div_rn(1.0, scale)
    first = row.to(tl.int64) * length
    for start in range(0, length, BLOCK):
        here = start + tl.arange(0, BLOCK)
        value = tl.load(x_ptr + first + here, mask=here < length, other=0.0).to(tl.float32)
        q, rounded, above, inside = on_grid(value, scale, inverse, offset, qmin, qmax, LEARNED)
        tl.store(y_ptr + first + here, ((q + offset) * scale).to(y_ptr.dtype.element_ty), mask=here < length)


@triton.jit(do_not_specialize_on_alignment=ENDS)
def backward_rows_kernel(
    grad_ptr, x_ptr, out_ptr, low_ptr, high_ptr, low_grad_ptr, high_grad_ptr, length, qmin, qmax, smallest,
    SYMMETRIC: tl.constexpr, LEARNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a row and of the ends of its range."""
    row = tl.program_id(0)
    low, high = tl.load(low_ptr + row), tl.load(high_ptr + row)
    scale, offset, raw, free = grid_of(low, high, qmin, qmax, smallest, SYMMETRIC)
    inverse = tl.div_rn(1.0, scale)
    by_scale = tl.zeros([BLOCK], tl.float32)
    by_offset = tl.zeros([BLOCK], tl.float32)
    first = row.to(tl.int64) * length
    for start in range(0, length, BLOCK):
        here = start + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + first + here, mask=here < length, other=0.0).to(tl.float32)
        value = tl.load(x_ptr + first + here, mask=here < length, other=0.0).to(tl.float32)
        q, rounded, above, inside = on_grid(value, scale, inverse, offset, qmin, qmax, LEARNED)
        out = tl.where(inside, grad, 0.0)
        tl.store(out_ptr + first + here, out.to(out_ptr.dtype.element_ty), mask=here < length)
        if LEARNED:
            by_scale += grad * tl.where(inside, tl.fma(rounded, scale, -value) * inverse, q + offset)
            by_offset += tl.where(inside, 0.0, grad)
    if LEARNED:
        all_by_scale, all_by_offset = tl.sum(by_scale, axis=0).to(tl.float64), tl.sum(by_offset, axis=0).to(tl.float64)
        by_low, by_high = range_gradients(all_by_scale, all_by_offset, low, high, qmin, qmax, smallest, SYMMETRIC)
        tl.store(low_grad_ptr + row, by_low.to(tl.float32))
        tl.store(high_grad_ptr + row, by_high.to(tl.float32))
