// Biases as integer hardware adds them: see `biases.py`.

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
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

Tensor rounded(const Tensor& bias, const Tensor& input_low, const Tensor& input_high, const Tensor& weight_low,
               const Tensor& weight_high, const Range& of_input, const Range& of_weight) {
  const Tensor from = bias.contiguous(), lows = weight_low.contiguous(), highs = weight_high.contiguous();
  const Tensor result = at::empty_like(from);
  const float* x = from.const_data_ptr<float>();
  const float *low = lows.const_data_ptr<float>(), *high = highs.const_data_ptr<float>();
  float* y = result.mutable_data_ptr<float>();
  const double input = of_input.scale(*input_low.const_data_ptr<float>(), *input_high.const_data_ptr<float>());
  const int64_t n = from.numel(), channels = lows.numel();
  for (int64_t i = 0; i < n; ++i) {  // groups of a transposed convolution have the same scales
    const double scale = of_weight.scale(low[i % channels], high[i % channels]) * input;
    y[i] = float(std::nearbyint(double(x[i]) / scale)) * float(scale);
  }
  return result;
}

struct RoundBias : torch::autograd::Function<RoundBias> {
  static Tensor forward(torch::autograd::AutogradContext*, const Tensor& bias, const Tensor& input_low,
                        const Tensor& input_high, const Tensor& weight_low, const Tensor& weight_high,
                        double input_steps, double input_smallest, double weight_steps, double weight_smallest) {
    return rounded(bias, input_low, input_high, weight_low, weight_high, {float(input_steps), float(input_smallest)},
                   {float(weight_steps), float(weight_smallest)});
  }

  // straight through
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                 const torch::autograd::variable_list& grads) {
    torch::autograd::variable_list result(9);
    result[0] = grads[0];
    return result;
  }
};

Tensor round_bias(const Tensor& bias, const Tensor& input_low, const Tensor& input_high, const Tensor& weight_low,
                  const Tensor& weight_high, double input_steps, double input_smallest, double weight_steps,
                  double weight_smallest) {
  if (at::GradMode::is_enabled() && bias.requires_grad()) {
    return RoundBias::apply(bias, input_low, input_high, weight_low, weight_high, input_steps, input_smallest,
                            weight_steps, weight_smallest);
  }
  return rounded(bias, input_low, input_high, weight_low, weight_high, {float(input_steps), float(input_smallest)},
                 {float(weight_steps), float(weight_smallest)});
}

}  // namespace
}  // namespace lightning_quant

TORCH_LIBRARY_FRAGMENT(lightning_quant, library) {
  library.def(
      "round_bias(Tensor bias, Tensor input_low, Tensor input_high, Tensor weight_low, Tensor weight_high,"
      " float input_steps, float input_smallest, float weight_steps, float weight_smallest) -> Tensor",
      lightning_quant::round_bias);
}
