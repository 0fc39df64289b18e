// Fake quantization in one pass over memory, with its gradients in another.
//
// The arithmetic is that of AIMET's `quantize_dequantize`, operation by operation, so that losses and gradients of the
// weights come out bit for bit the same: it divides by the scale where ranges are learned, and multiplies with its
// reciprocal where they are not, as PyTorch's `fake_quantize_per_*_affine` does, which AIMET calls there.

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "layout.h"

namespace lightning_quant {
namespace {

enum Activation : int64_t { NONE = 0, RELU = 1, HARDSWISH = 2, RELU6 = 3 };

// What a forward pass saves for its backward pass. Weights are saved anyway, and so is the input of a hardswish; of
// other activations the gradients need two bytes per value, or one bit if the range is not learned.
enum Kept : int64_t { INPUT = 0, CODES = 1, BITS = 2 };

constexpr int16_t ABOVE = 32767, BELOW = -32768;  // codes of values outside the range
constexpr int16_t CUT_OFF = 32766;                // code of a value inside to which a ReLU gives no gradient
// Codes of the others: their rounding error, at most a little more than half a step, times this.
constexpr float CODE_SCALE = 64000.f;

struct Grid {
  float qmin, qmax;
  bool symmetric;
  float steps() const { return qmax - qmin; }
};

// Scale and offset of one channel, and what the gradients of its ends need; see AIMET's `get_scale`, `_get_offset`.
struct Encoding {
  float scale, inverse, offset, sign;
  bool offset_learns;

  // torch.clamp gives no gradient to what lies on its bounds
  Encoding(float low, float high, const Grid& grid, float smallest) {
    const float raw = (high - low) / grid.steps();
    scale = std::max(std::abs(raw), smallest);
    sign = std::abs(raw) > smallest ? (raw > 0 ? 1.f : raw < 0 ? -1.f : 0.f) : 0.f;
    inverse = 1.f / scale;
    const float free = std::nearbyint(low / scale) - grid.qmin;
    offset_learns = !grid.symmetric && free > -grid.qmax && free < -grid.qmin;
    offset = grid.symmetric ? -std::nearbyint((grid.qmin + grid.qmax) / 2)
                            : std::min(std::max(free, -grid.qmax), -grid.qmin);
  }
};

inline float activate(float x, Activation activation) {
  switch (activation) {
    case RELU:
      return x < 0.f ? 0.f : x;  // NaN stays NaN
    case RELU6:
      return x < 0.f ? 0.f : x > 6.f ? 6.f : x;
    case HARDSWISH: {
      const float shifted = x + 3.f;
      const float positive = shifted < 0.f ? 0.f : shifted;
      return x * (positive > 6.f ? 6.f : positive) / 6.f;
    }
    default:
      return x;
  }
}

inline float activation_gradient(float grad, float x, Activation activation) {
  switch (activation) {
    case RELU:
      return x <= 0.f ? 0.f : grad;
    case RELU6:
      return x <= 0.f || x >= 6.f ? 0.f : grad;
    case HARDSWISH:
      return x <= -3.f ? 0.f : x >= 3.f ? grad : grad * (x / 3.f + 0.5f);
    default:
      return grad;
  }
}

// Whether an activation gives no gradient to a value; to all others it passes theirs unchanged.
inline bool cuts_off(float x, Activation activation) {
  return (activation == RELU || activation == RELU6) && (x <= 0.f || (activation == RELU6 && x >= 6.f));
}

// Eight bytes of 0 and 1 to the bits of one byte, and back: the multiplications put each bit where it belongs.
inline void pack(const uint8_t* __restrict passes, uint8_t* __restrict bits, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, passes + i, 8);
    bits[i / 8] = uint8_t((eight * 0x0102040810204080ULL) >> 56);
  }
}

inline void unpack(const uint8_t* __restrict bits, uint8_t* __restrict passes, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    const uint64_t eight = ((bits[i / 8] * 0x0101010101010101ULL) & 0x8040201008040201ULL);
    const uint64_t ones = ((eight + 0x7F7F7F7F7F7F7F7FULL) | eight) >> 7 & 0x0101010101010101ULL;
    std::memcpy(passes + i, &ones, 8);
  }
}

// The rounding error, in units of the scale. With 65,535 steps the difference of two floats has three digits left; a
// fused product, where the processor has one, keeps them all.
inline float rounding_error(float rounded, [[maybe_unused]] float scaled, [[maybe_unused]] float value,
                            [[maybe_unused]] float scale, [[maybe_unused]] float inverse) {
#if defined(__FMA__) || defined(__aarch64__)
  return std::fma(rounded, scale, -value) * inverse;
#else
  return rounded - scaled;
#endif
}

template <Activation activation, bool learned, Kept kept>
void forward_run(const float* __restrict x, float* __restrict y, void* __restrict keep, int64_t n, const Encoding& e,
                 const Grid& grid) {
  const float scale = e.scale, inverse = e.inverse, offset = e.offset, qmin = grid.qmin, qmax = grid.qmax;
  auto* __restrict codes = static_cast<int16_t*>(keep);
  auto* __restrict bits = static_cast<uint8_t*>(keep);
  alignas(64) uint8_t passes[BLOCK + 8] = {};
  for (int64_t start = 0; start < n; start += BLOCK) {
    const int64_t end = std::min(start + BLOCK, n);
    for (int64_t i = start; i < end; ++i) {
      const float value = activate(x[i], activation);
      const float scaled = learned ? value / scale : value * inverse;
      const float rounded = std::nearbyint(scaled);
      float q = rounded - offset;
      const bool above = q > qmax, inside = q >= qmin && q <= qmax;
      if constexpr (kept == CODES) {
        const float error = rounding_error(rounded, scaled, value, scale, inverse) * CODE_SCALE;
        const int16_t code = cuts_off(x[i], activation) ? CUT_OFF : int16_t(int32_t(std::nearbyint(error)));
        codes[i] = inside ? code : above ? ABOVE : BELOW;
      }
      if constexpr (kept == BITS) passes[i - start] = inside && !cuts_off(x[i], activation);
      q = q < qmin ? qmin : q;
      q = above ? qmax : q;
      y[i] = (q + offset) * scale;
    }
    if constexpr (kept == BITS) pack(passes, bits + start / 8, end - start);
  }
}

struct Sums {
  double scale = 0, offset = 0;

  void operator+=(const Sums& other) {
    scale += other.scale;
    offset += other.offset;
  }
};

template <Activation activation, bool learned>
Sums backward_run(const float* __restrict grad, const float* __restrict x, float* __restrict out, int64_t n,
                  const Encoding& e, const Grid& grid) {
  const float scale = e.scale, inverse = e.inverse, offset = e.offset, qmin = grid.qmin, qmax = grid.qmax;
  Sums sums;
  for (int64_t start = 0; start < n; start += BLOCK) {
    const int64_t end = std::min(start + BLOCK, n);
    float by_scale = 0, by_offset = 0;
#pragma omp simd reduction(+ : by_scale, by_offset)
    for (int64_t i = start; i < end; ++i) {
      const float value = activate(x[i], activation);
      const float scaled = learned ? value / scale : value * inverse;
      const float rounded = std::nearbyint(scaled);
      const float q = rounded - offset;
      const bool inside = qmin <= q && q <= qmax;
      out[i] = activation_gradient(inside ? grad[i] : 0.f, x[i], activation);
      if (learned) {
        const float lowest = qmin + offset, highest = qmax + offset;
        float clamped = rounded < lowest ? lowest : rounded;
        clamped = clamped > highest ? highest : clamped;
        by_scale += grad[i] * (inside ? rounding_error(rounded, scaled, value, scale, inverse) : clamped);
        by_offset += inside ? 0.f : grad[i];
      }
    }
    sums.scale += by_scale;
    sums.offset += by_offset;
  }
  sums.offset *= scale;
  return sums;
}

Sums backward_of_codes(const float* __restrict grad, const int16_t* __restrict codes, float* __restrict out, int64_t n,
                       const Encoding& e, const Grid& grid) {
  const float lowest = grid.qmin + e.offset, highest = grid.qmax + e.offset;
  Sums sums;
  for (int64_t start = 0; start < n; start += BLOCK) {
    const int64_t end = std::min(start + BLOCK, n);
    float by_scale = 0, by_offset = 0;
#pragma omp simd reduction(+ : by_scale, by_offset)
    for (int64_t i = start; i < end; ++i) {
      const int32_t code = codes[i];
      const bool inside = code != ABOVE && code != BELOW, cut_off = code == CUT_OFF;
      const float error = cut_off ? 0.f : float(code) * (1.f / CODE_SCALE);
      out[i] = inside && !cut_off ? grad[i] : 0.f;
      by_scale += grad[i] * (inside ? error : code == ABOVE ? highest : lowest);
      by_offset += inside ? 0.f : grad[i];
    }
    sums.scale += by_scale;
    sums.offset += by_offset;
  }
  sums.offset *= e.scale;
  return sums;
}

void backward_of_bits(const float* __restrict grad, const uint8_t* __restrict bits, float* __restrict out, int64_t n) {
  alignas(64) uint8_t passes[BLOCK + 8];
  for (int64_t start = 0; start < n; start += BLOCK) {
    const int64_t end = std::min(start + BLOCK, n);
    unpack(bits + start / 8, passes, end - start);
    for (int64_t i = start; i < end; ++i) out[i] = passes[i - start] ? grad[i] : 0.f;
  }
}

std::vector<Encoding> encodings(const Tensor& low, const Tensor& high, const Grid& grid, double smallest) {
  const Tensor lows = low.contiguous(), highs = high.contiguous();
  std::vector<Encoding> result;
  result.reserve(low.numel());
  for (int64_t i = 0; i < low.numel(); ++i)
    result.emplace_back(lows.const_data_ptr<float>()[i], highs.const_data_ptr<float>()[i], grid, float(smallest));
  return result;
}

template <typename Call>
void with_activation(int64_t activation, bool learned, const Call& call) {
  auto pick = [&](auto kind) { learned ? call(kind, std::true_type{}) : call(kind, std::false_type{}); };
  switch (activation) {
    case RELU:
      return pick(std::integral_constant<Activation, RELU>{});
    case HARDSWISH:
      return pick(std::integral_constant<Activation, HARDSWISH>{});
    case RELU6:
      return pick(std::integral_constant<Activation, RELU6>{});
    default:
      TORCH_CHECK(activation == NONE, "activation ", activation, " is not computed here");
      return pick(std::integral_constant<Activation, NONE>{});
  }
}

// The output, and what its backward pass needs if `kept` says that it is not the input.
std::pair<Tensor, Tensor> forward_pass(const Tensor& x, const Tensor& low, const Tensor& high, const Grid& grid,
                                       double smallest, int64_t activation, bool learned, Kept kept) {
  Tensor y = at::empty_like(x), keep;
  const Layout layout(x, low);
  const auto all = encodings(low, high, grid, smallest);
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  auto run = [&](auto kind, auto learns, auto keeps) {
    if constexpr (keeps.value == CODES) keep = at::empty_like(x, x.options().dtype(at::kShort));
    if constexpr (keeps.value == BITS) keep = at::empty({(x.numel() + 7) / 8}, x.options().dtype(at::kByte));
    char* kept_at = keep.defined() ? static_cast<char*>(keep.mutable_data_ptr()) : nullptr;
    for_each_stretch(layout, [&](int64_t channel, int64_t start, int64_t length) {
      // stretches of a tensor with one range start at multiples of 8
      char* own = keeps.value == CODES ? kept_at + 2 * start : keeps.value == BITS ? kept_at + start / 8 : nullptr;
      forward_run<kind.value, learns.value, keeps.value>(from + start, to + start, own, length, all[channel], grid);
      return Nothing();
    });
  };
  with_activation(activation, learned, [&](auto kind, auto learns) {
    if constexpr (kind.value != HARDSWISH && learns.value) {
      if (kept == CODES) return run(kind, learns, std::integral_constant<Kept, CODES>{});
    }
    if constexpr (kind.value != HARDSWISH && !learns.value) {
      if (kept == BITS) return run(kind, learns, std::integral_constant<Kept, BITS>{});
    }
    run(kind, learns, std::integral_constant<Kept, INPUT>{});
  });
  return {y, keep};
}

class FakeQuantize : public torch::autograd::Function<FakeQuantize> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x, const Tensor& low,
                        const Tensor& high, int64_t qmin, int64_t qmax, bool symmetric, double smallest,
                        int64_t activation, bool learned, int64_t kept) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, keep] = forward_pass(x, low, high, {float(qmin), float(qmax), symmetric}, smallest, activation, learned,
                                  Kept(kept));
    context->save_for_backward({keep.defined() ? keep : x, low, high});
    auto& data = context->saved_data;
    data["qmin"] = qmin;
    data["qmax"] = qmax;
    data["symmetric"] = symmetric;
    data["smallest"] = smallest;
    data["activation"] = activation;
    data["learned"] = learned;
    data["kept"] = kept;
    data["strides"] = x.strides();
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "The fake quantization of lightning_quant has no second derivative: expected backward() without "
                "create_graph=True. Set LIGHTNING_QUANT_STOCK=1 to use AIMET's.");
    auto& data = context->saved_data;
    const auto saved = context->get_saved_variables();
    const Tensor &keep = saved[0], &low = saved[1], &high = saved[2];
    const Grid grid{float(data["qmin"].toInt()), float(data["qmax"].toInt()), data["symmetric"].toBool()};
    const bool learned = data["learned"].toBool();
    const auto kept = Kept(data["kept"].toInt());
    const std::vector<int64_t> strides = data["strides"].toIntVector();
    // the order of x in memory, so that all are walked together
    Tensor grad = grads[0];
    if (grad.strides() != at::IntArrayRef(strides)) {
      grad = at::empty_strided(grad.sizes(), strides, grad.options());
      grad.copy_(grads[0]);
    }
    Tensor out = at::empty_like(grad);
    const Layout layout(grad, low);
    const auto all = encodings(low, high, grid, data["smallest"].toDouble());
    std::vector<Sums> sums;
    const float* given = grad.const_data_ptr<float>();
    float* to = out.mutable_data_ptr<float>();
    if (kept == CODES) {
      const int16_t* codes = keep.const_data_ptr<int16_t>();
      sums = for_each_stretch(layout, [&](int64_t channel, int64_t start, int64_t length) {
        return backward_of_codes(given + start, codes + start, to + start, length, all[channel], grid);
      });
    } else if (kept == BITS) {
      const uint8_t* bits = keep.const_data_ptr<uint8_t>();
      for_each_stretch(layout, [&](int64_t, int64_t start, int64_t length) {
        backward_of_bits(given + start, bits + start / 8, to + start, length);
        return Nothing();
      });
    } else {
      const float* from = keep.const_data_ptr<float>();
      with_activation(data["activation"].toInt(), learned, [&](auto kind, auto learns) {
        sums = for_each_stretch(layout, [&](int64_t channel, int64_t start, int64_t length) {
          return backward_run<kind.value, learns.value>(given + start, from + start, to + start, length, all[channel],
                                                        grid);
        });
      });
    }
    torch::autograd::variable_list result(10);
    result[0] = out;
    if (!learned) return result;
    // scale = |max - min| / steps; offset = round(min / scale) - qmin, straight through the rounding
    result[1] = at::empty_like(low, at::MemoryFormat::Contiguous);
    result[2] = at::empty_like(high, at::MemoryFormat::Contiguous);
    const Tensor lows = low.contiguous();
    for (size_t c = 0; c < all.size(); ++c) {
      const Encoding& e = all[c];
      const double by_offset = e.offset_learns ? sums[c].offset : 0;
      const double by_scale = sums[c].scale - by_offset * lows.const_data_ptr<float>()[c] / (double(e.scale) * e.scale);
      const double by_high = by_scale * e.sign / grid.steps();
      result[1].mutable_data_ptr<float>()[c] = float(by_offset / e.scale - by_high);
      result[2].mutable_data_ptr<float>()[c] = float(by_high);
    }
    return result;
  }
};

Tensor fake_quantize(const Tensor& given, const Tensor& low, const Tensor& high, int64_t qmin, int64_t qmax,
                     bool symmetric, double smallest, int64_t activation) {
  const bool records = at::GradMode::is_enabled();
  const bool learned = records && (low.requires_grad() || high.requires_grad());
  const Tensor x = readable(given, low);
  if (records && (learned || x.requires_grad())) {
    const bool stays = x.is_leaf() || low.numel() != 1 || activation == HARDSWISH;
    const Kept kept = stays ? INPUT : learned ? CODES : BITS;
    return FakeQuantize::apply(x, low, high, qmin, qmax, symmetric, smallest, activation, learned, int64_t(kept));
  }
  return forward_pass(x, low, high, {float(qmin), float(qmax), symmetric}, smallest, activation, learned, INPUT).first;
}

}  // namespace
}  // namespace lightning_quant

TORCH_LIBRARY_FRAGMENT(lightning_quant, library) {
  library.def(
      "fake_quantize(Tensor x, Tensor min, Tensor max, int qmin, int qmax, bool symmetric, float smallest_scale,"
      " int activation=0) -> Tensor",
      lightning_quant::fake_quantize);
}
