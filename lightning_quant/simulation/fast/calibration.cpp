// The histograms of calibration, and the noise of quantizing them, each in one pass over memory.

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <mutex>

#include "layout.h"

namespace lightning_quant {
namespace {

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
    // neighbors are often alike: four tables keep their increments from waiting for each other
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
    return Nothing();
  });
  return counts;
}

// The error of quantizing histograms [N, bins], whose bins have the given centers [N, bins], to each of the grids with
// scales [N, M] and offsets [N, M]: the sum of squared errors, those of clipped numbers times gamma; see AIMET's
// `_estimate_clip_and_quant_noise`.
Tensor quantization_noise(const Tensor& counts, const Tensor& centers, const Tensor& scales, const Tensor& offsets,
                          double steps, double gamma) {
  TORCH_CHECK(counts.is_contiguous() && centers.is_contiguous() && scales.is_contiguous() && offsets.is_contiguous(),
              "expected contiguous tensors");
  const int64_t bins = counts.size(1), grids = scales.size(1);
  Tensor noise = at::empty_like(scales);
  const float highest = float(steps), weight = float(gamma);
  at::parallel_for(0, counts.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> count(bins), center(bins);
    for (int64_t row = begin; row < end; ++row) {
      int64_t filled = 0;  // a channel of a depthwise convolution has nine weights in its 512 bins
      for (int64_t bin = 0; bin < bins; ++bin) {
        const float n = counts.const_data_ptr<float>()[row * bins + bin];
        if (n == 0.f) continue;
        count[filled] = n;
        center[filled++] = centers.const_data_ptr<float>()[row * bins + bin];
      }
      for (int64_t grid = 0; grid < grids; ++grid) {
        const float scale = scales.const_data_ptr<float>()[row * grids + grid];
        const float offset = offsets.const_data_ptr<float>()[row * grids + grid];
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t bin = 0; bin < filled; ++bin) {
          const float exact = std::nearbyint(center[bin] / scale - offset);
          float q = exact < 0.f ? 0.f : exact;
          q = q > highest ? highest : q;
          const float error = (q + offset) * scale - center[bin];
          sum += error * error * count[bin] * (q == exact ? 1.f : weight);
        }
        noise.mutable_data_ptr<float>()[row * grids + grid] = sum;
      }
    }
  });
  return noise;
}

}  // namespace
}  // namespace lightning_quant

TORCH_LIBRARY_FRAGMENT(lightning_quant, library) {
  library.def("histograms(Tensor x, Tensor low, Tensor high, int bins) -> Tensor", lightning_quant::histograms);
  library.def(
      "quantization_noise(Tensor counts, Tensor centers, Tensor scales, Tensor offsets, float steps, float gamma)"
      " -> Tensor",
      lightning_quant::quantization_noise);
}
