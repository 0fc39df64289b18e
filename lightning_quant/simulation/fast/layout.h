// A tensor as stretches of memory that share one range, walked on all threads.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

namespace lightning_quant {

using at::Tensor;

constexpr int64_t GRAIN = 32768;  // numbers a thread takes at least, as in ATen
constexpr int64_t BLOCK = 2048;   // numbers taken together: summed in float before they are added to a double

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

// What a run returns that adds nothing up.
struct Nothing {
  void operator+=(const Nothing&) {}
};

// Calls run(channel, start, length) for every stretch of memory with one range, on all threads, and adds up what it
// returns by channel; in an order that does not depend on the threads, so that the sums are the same every time.
template <typename Run>
auto for_each_stretch(const Layout& layout, const Run& run) {
  using Result = decltype(run(int64_t(), int64_t(), int64_t()));
  std::vector<Result> sums(layout.channels);
  if (layout.channels == 1) {
    std::vector<Result> parts((layout.inner + GRAIN - 1) / GRAIN);
    at::parallel_for(0, parts.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part)
        parts[part] = run(0, part * GRAIN, std::min(GRAIN, layout.inner - part * GRAIN));
    });
    for (const Result& part : parts) sums[0] += part;
    return sums;
  }
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, layout.outer * layout.inner));
  at::parallel_for(0, layout.channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t o = 0; o < layout.outer; ++o)
      for (int64_t c = begin; c < end; ++c) sums[c] += run(c, (o * layout.channels + c) * layout.inner, layout.inner);
  });
  return sums;
}

// Memory in any dense order will do for one range; several need the order of the dimensions.
inline Tensor readable(const Tensor& x, const Tensor& low) {
  return low.numel() == 1 && x.is_non_overlapping_and_dense() ? x : x.contiguous();
}

}  // namespace lightning_quant
