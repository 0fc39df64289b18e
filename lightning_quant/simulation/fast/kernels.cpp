// Fake quantization in one pass over memory, with its gradients in another; and the histograms of calibration.
//
// The arithmetic is that of AIMET's `quantize_dequantize`, operation by operation, so that losses and gradients of the
// weights come out bit for bit the same: it divides by the scale where ranges are learned, and multiplies with its
// reciprocal where they are not, as PyTorch's `fake_quantize_per_*_affine` does, which AIMET calls there.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <vector>

namespace {

using at::Tensor;

enum Activation : int64_t { NONE = 0, RELU = 1, HARDSWISH = 2 };

constexpr int64_t GRAIN = 32768;  // numbers a thread takes at least, as in ATen
constexpr int64_t BLOCK = 2048;   // numbers summed in float before they are added to a double

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
    case HARDSWISH:
      return x <= -3.f ? 0.f : x >= 3.f ? grad : grad * (x / 3.f + 0.5f);
    default:
      return grad;
  }
}

template <Activation activation, bool learned>
void forward_run(const float* __restrict x, float* __restrict y, int64_t n, const Encoding& e, const Grid& grid) {
  const float scale = e.scale, inverse = e.inverse, offset = e.offset, qmin = grid.qmin, qmax = grid.qmax;
  for (int64_t i = 0; i < n; ++i) {
    const float value = activate(x[i], activation);
    float q = std::nearbyint(learned ? value / scale : value * inverse) - offset;
    q = q < qmin ? qmin : q;
    q = q > qmax ? qmax : q;
    y[i] = (q + offset) * scale;
  }
}

struct Sums {
  double scale = 0, offset = 0;

  void operator+=(const Sums& other) {
    scale += other.scale;
    offset += other.offset;
  }
};

// How far rounding went, in steps. The 65,535 steps of 16 bits leave the difference of two floats three digits; the
// product in full precision keeps them all, where the processor has it.
inline float rounding_error(float rounded, [[maybe_unused]] float scaled, [[maybe_unused]] float value,
                            [[maybe_unused]] float scale, [[maybe_unused]] float inverse) {
#if defined(__FMA__) || defined(__aarch64__)
  return std::fma(rounded, scale, -value) * inverse;
#else
  return rounded - scaled;
#endif
}

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

// A tensor as [outer, channels, inner]: channel c holds the numbers [o, c, :].
struct Layout {
  int64_t outer = 1, channels = 1, inner = 1;

  Layout(const Tensor& x, const Tensor& low) {
    inner = x.numel();
    if (low.numel() == 1) return;
    inner = 1;
    const int64_t missing = x.dim() - low.dim();
    bool found = false;
    for (int64_t axis = 0; axis < x.dim(); ++axis) {
      const bool is_channel = axis >= missing && low.size(axis - missing) != 1;
      if (is_channel) {
        TORCH_CHECK(!found && low.size(axis - missing) == x.size(axis), "ranges of shape ", low.sizes(),
                    " do not fit a tensor of shape ", x.sizes(), ": expected one range, or one for each channel");
        channels = x.size(axis);
        found = true;
      } else {
        (found ? inner : outer) *= x.size(axis);
      }
    }
  }
};

std::vector<Encoding> encodings(const Tensor& low, const Tensor& high, const Grid& grid, double smallest) {
  const Tensor lows = low.contiguous(), highs = high.contiguous();
  std::vector<Encoding> result;
  result.reserve(low.numel());
  for (int64_t i = 0; i < low.numel(); ++i)
    result.emplace_back(lows.const_data_ptr<float>()[i], highs.const_data_ptr<float>()[i], grid, float(smallest));
  return result;
}

// Calls run(channel, start, length) for every stretch of memory with one range, on all threads, and adds up what it
// returns by channel; in an order that does not depend on the threads, so that the sums are the same every time.
template <typename Run>
std::vector<Sums> for_each_stretch(const Layout& layout, const Run& run) {
  std::vector<Sums> sums(layout.channels);
  if (layout.channels == 1) {
    std::vector<Sums> parts((layout.inner + GRAIN - 1) / GRAIN);
    at::parallel_for(0, parts.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part)
        parts[part] = run(0, part * GRAIN, std::min(GRAIN, layout.inner - part * GRAIN));
    });
    for (const Sums& part : parts) sums[0] += part;
    return sums;
  }
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, layout.outer * layout.inner));
  at::parallel_for(0, layout.channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t o = 0; o < layout.outer; ++o)
      for (int64_t c = begin; c < end; ++c) sums[c] += run(c, (o * layout.channels + c) * layout.inner, layout.inner);
  });
  return sums;
}

template <typename Call>
void with_activation(int64_t activation, bool learned, const Call& call) {
  auto pick = [&](auto kind) { learned ? call(kind, std::true_type{}) : call(kind, std::false_type{}); };
  switch (activation) {
    case RELU:
      return pick(std::integral_constant<Activation, RELU>{});
    case HARDSWISH:
      return pick(std::integral_constant<Activation, HARDSWISH>{});
    default:
      return pick(std::integral_constant<Activation, NONE>{});
  }
}

// Memory in any dense order will do for one range; several need the order of the dimensions.
Tensor readable(const Tensor& x, const Tensor& low) {
  return low.numel() == 1 && x.is_non_overlapping_and_dense() ? x : x.contiguous();
}

Tensor forward_pass(const Tensor& x, const Tensor& low, const Tensor& high, const Grid& grid, double smallest,
                    int64_t activation, bool learned) {
  Tensor y = at::empty_like(x);
  const Layout layout(x, low);
  const auto all = encodings(low, high, grid, smallest);
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  with_activation(activation, learned, [&](auto kind, auto learns) {
    for_each_stretch(layout, [&](int64_t channel, int64_t start, int64_t length) {
      forward_run<kind.value, learns.value>(from + start, to + start, length, all[channel], grid);
      return Sums();
    });
  });
  return y;
}

class FakeQuantize : public torch::autograd::Function<FakeQuantize> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x, const Tensor& low,
                        const Tensor& high, int64_t qmin, int64_t qmax, bool symmetric, double smallest,
                        int64_t activation, bool learned) {
    at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({x, low, high});
    context->saved_data["qmin"] = qmin;
    context->saved_data["qmax"] = qmax;
    context->saved_data["symmetric"] = symmetric;
    context->saved_data["smallest"] = smallest;
    context->saved_data["activation"] = activation;
    context->saved_data["learned"] = learned;
    return forward_pass(x, low, high, {float(qmin), float(qmax), symmetric}, smallest, activation, learned);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &x = saved[0], &low = saved[1], &high = saved[2];
    const Grid grid{float(context->saved_data["qmin"].toInt()), float(context->saved_data["qmax"].toInt()),
                    context->saved_data["symmetric"].toBool()};
    const bool learned = context->saved_data["learned"].toBool();
    // the order of x in memory, so that both are walked together
    Tensor grad = grads[0];
    if (grad.strides() != x.strides()) {
      grad = at::empty_like(x);
      grad.copy_(grads[0]);
    }
    Tensor out = at::empty_like(x);
    const Layout layout(x, low);
    const auto all = encodings(low, high, grid, context->saved_data["smallest"].toDouble());
    std::vector<Sums> sums;
    const float *given = grad.const_data_ptr<float>(), *from = x.const_data_ptr<float>();
    float* to = out.mutable_data_ptr<float>();
    with_activation(context->saved_data["activation"].toInt(), learned, [&](auto kind, auto learns) {
      sums = for_each_stretch(layout, [&](int64_t channel, int64_t start, int64_t length) {
        return backward_run<kind.value, learns.value>(given + start, from + start, to + start, length, all[channel],
                                                      grid);
      });
    });
    if (!learned) return {out, Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
    // scale = |max - min| / steps; offset = round(min / scale) - qmin, straight through the rounding
    Tensor low_grad = at::empty_like(low, at::MemoryFormat::Contiguous);
    Tensor high_grad = at::empty_like(high, at::MemoryFormat::Contiguous);
    const Tensor lows = low.contiguous();
    for (size_t c = 0; c < all.size(); ++c) {
      const Encoding& e = all[c];
      const double by_offset = e.offset_learns ? sums[c].offset : 0;
      const double by_scale = sums[c].scale - by_offset * lows.const_data_ptr<float>()[c] / (double(e.scale) * e.scale);
      const double by_high = by_scale * e.sign / grid.steps();
      high_grad.mutable_data_ptr<float>()[c] = float(by_high);
      low_grad.mutable_data_ptr<float>()[c] = float(by_offset / e.scale - by_high);
    }
    return {out, low_grad, high_grad, Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor fake_quantize(const Tensor& given, const Tensor& low, const Tensor& high, int64_t qmin, int64_t qmax,
                     bool symmetric, double smallest, int64_t activation) {
  const bool records = at::GradMode::is_enabled();
  const bool learned = records && (low.requires_grad() || high.requires_grad());
  const Tensor x = readable(given, low);
  if (records && (learned || x.requires_grad()))
    return FakeQuantize::apply(x, low, high, qmin, qmax, symmetric, smallest, activation, learned);
  return forward_pass(x, low, high, {float(qmin), float(qmax), symmetric}, smallest, activation, learned);
}

// Counts of x in equal bins between low and high, one row for each range; what lies outside counts for the bin at that
// end, as in AIMET, and NaN for none. The bin of a number is computed as in torch.histc.
Tensor histograms(const Tensor& given, const Tensor& low, const Tensor& high, int64_t bins) {
  const Tensor x = readable(given, low), lows = low.contiguous(), highs = high.contiguous();
  const Layout layout(x, low);
  Tensor counts = at::zeros({layout.channels, bins}, x.options());
  const float* from = x.const_data_ptr<float>();
  float* to = counts.mutable_data_ptr<float>();
  std::mutex lock;
  for_each_stretch(layout, [&](int64_t channel, int64_t start, int64_t length) {
    const float left = lows.const_data_ptr<float>()[channel], right = highs.const_data_ptr<float>()[channel];
    const float per_width = right - left, last = float(bins - 1);
    // neighbours are often alike: four tables keep their increments from waiting for each other
    std::vector<int32_t> tables(4 * (bins + 1));
    int32_t places[BLOCK];
    for (int64_t block = 0; block < length; block += BLOCK) {
      const int64_t n = std::min(BLOCK, length - block);
      const float* numbers = from + start + block;
      for (int64_t i = 0; i < n; ++i) {
        float place = (numbers[i] - left) * float(bins) / per_width;
        place = place < 0.f ? 0.f : place;
        place = place > last ? last : place;
        places[i] = numbers[i] == numbers[i] ? int32_t(place) : int32_t(bins);
      }
      for (int64_t i = 0; i < n; ++i) ++tables[(i & 3) * (bins + 1) + places[i]];
    }
    const std::lock_guard<std::mutex> held(lock);  // whole numbers: any order gives the same sums
    for (int64_t table = 0; table < 4; ++table)
      for (int64_t bin = 0; bin < bins; ++bin) to[channel * bins + bin] += tables[table * (bins + 1) + bin];
    return Sums();
  });
  return counts;
}

// The error of quantizing histograms [N, bins], whose bins have the given centres [N, bins], to each of the grids with
// scales [N, M] and offsets [N, M]: the sum of squared errors, those of clipped numbers times gamma; see AIMET's
// `_estimate_clip_and_quant_noise`.
Tensor quantization_noise(const Tensor& counts, const Tensor& centres, const Tensor& scales, const Tensor& offsets,
                          double steps, double gamma) {
  TORCH_CHECK(counts.is_contiguous() && centres.is_contiguous() && scales.is_contiguous() && offsets.is_contiguous(),
              "expected contiguous tensors");
  const int64_t bins = counts.size(1), grids = scales.size(1);
  Tensor noise = at::empty_like(scales);
  const float highest = float(steps), weight = float(gamma);
  at::parallel_for(0, counts.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> count(bins), centre(bins);
    for (int64_t row = begin; row < end; ++row) {
      int64_t filled = 0;  // a channel of a depthwise convolution has nine weights in its 512 bins
      for (int64_t bin = 0; bin < bins; ++bin) {
        const float n = counts.const_data_ptr<float>()[row * bins + bin];
        if (n == 0.f) continue;
        count[filled] = n;
        centre[filled++] = centres.const_data_ptr<float>()[row * bins + bin];
      }
      for (int64_t grid = 0; grid < grids; ++grid) {
        const float scale = scales.const_data_ptr<float>()[row * grids + grid];
        const float offset = offsets.const_data_ptr<float>()[row * grids + grid];
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t bin = 0; bin < filled; ++bin) {
          const float exact = std::nearbyint(centre[bin] / scale - offset);
          float q = exact < 0.f ? 0.f : exact;
          q = q > highest ? highest : q;
          const float error = (q + offset) * scale - centre[bin];
          sum += error * error * count[bin] * (q == exact ? 1.f : weight);
        }
        noise.mutable_data_ptr<float>()[row * grids + grid] = sum;
      }
    }
  });
  return noise;
}

}  // namespace

TORCH_LIBRARY(lightning_quant, library) {
  library.def(
      "fake_quantize(Tensor x, Tensor min, Tensor max, int qmin, int qmax, bool symmetric, float smallest_scale,"
      " int activation=0) -> Tensor",
      fake_quantize);
  library.def("histograms(Tensor x, Tensor low, Tensor high, int bins) -> Tensor", histograms);
  library.def(
      "quantization_noise(Tensor counts, Tensor centres, Tensor scales, Tensor offsets, float steps, float gamma)"
      " -> Tensor",
      quantization_noise);
}
