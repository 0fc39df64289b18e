// Biases as integer hardware adds them: see `biases.py`.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

namespace lightning_quant {
namespace {

using at::Tensor;

struct Range {
  float steps, smallest;
  double scale(float low, float high) const { return std::max(std::abs((high - low) / steps), smallest); }
};

Tensor round_bias(const Tensor& bias, const Tensor& input_low, const Tensor& input_high, const Tensor& weight_low,
                  const Tensor& weight_high, double input_steps, double input_smallest, double weight_steps,
                  double weight_smallest) {
  // autograd takes it for a copy, whose gradient passes straight through: a function of our own would cost the host
  // several times as much, once for every layer
  const Tensor result = bias.clone(at::MemoryFormat::Contiguous);
  const Tensor lows = weight_low.contiguous(), highs = weight_high.contiguous();
  const Range of_input{float(input_steps), float(input_smallest)}, of_weight{float(weight_steps), float(weight_smallest)};
  const float *low = lows.const_data_ptr<float>(), *high = highs.const_data_ptr<float>();
  const double input = of_input.scale(*input_low.const_data_ptr<float>(), *input_high.const_data_ptr<float>());
  float* values = result.mutable_data_ptr<float>();
  const int64_t n = result.numel(), channels = lows.numel();
  for (int64_t i = 0; i < n; ++i) {  // groups of a transposed convolution have the same scales
    const double scale = of_weight.scale(low[i % channels], high[i % channels]) * input;
    values[i] = float(std::nearbyint(double(values[i]) / scale)) * float(scale);
  }
  return result;
}

}  // namespace
}  // namespace lightning_quant

TORCH_LIBRARY_FRAGMENT(lightning_quant, library) {
  library.def(
      "round_bias(Tensor bias, Tensor input_low, Tensor input_high, Tensor weight_low, Tensor weight_high,"
      " float input_steps, float input_smallest, float weight_steps, float weight_smallest) -> Tensor",
      lightning_quant::round_bias);
}
