// Runs {{ contract.file | cpp }} in ONNX Runtime. Made by lightning-quant from io.json; copy it before you change it.
//
//   g++ -std=c++17 host.cpp -I ORT/include -L ORT/lib -lonnxruntime -o host
//   ./host [--out FOLDER] [--qnn PROVIDER BACKEND [--soc NAME]] MODEL INPUT...
//
// INPUT: one file for each input, in order, {% for one in contract.inputs %}{{ ", " if not loop.first }}{{ bytes(one) }} bytes{% endfor %}; outputs are written as they are, output0.raw, ...
{% for one in contract.inputs if one.holds == "image" %}
//   input {{ position(contract.inputs, one) }}: {{ pixel_file(one) }}
{% endfor %}
// PROVIDER: libonnxruntime_providers_qnn.so, BACKEND: libQnnHtp.so, of onnxruntime-qnn 2.x; ORT: ONNX Runtime 1.24 or
// later. NAME: chip to emulate where there is no NPU, such as SM8650.
// Compiled and run with ONNX Runtime on x86 Linux: on the CPU, and in the NPU's emulator. Not run on a phone.

#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using Bytes = std::vector<char>;

struct Input {
  const char* name;
  std::vector<int64_t> shape;
  ONNXTensorElementDataType type;
  size_t bytes;
  bool image;           // pixels of 0...255; otherwise the file holds the elements
  bool channels_last;   // else all of the first channel, then all of the second
  bool reversed;        // blue before green before red
  size_t channels, height, width;
};

struct Output {
  const char* name;
  double scale;  // (integer - zero_point) * scale is the number that an integer stands for; 0: no such
  int64_t zero_point;
};

const std::vector<Input> kInputs = {
{% for one in contract.inputs %}
    {% raw %}{{% endraw %}{{ one.name | cpp }}, {% raw %}{{% endraw %}{{ one.shape | join(", ") }}}, ONNX_TENSOR_ELEMENT_DATA_TYPE_{{ onnx_type(one) }}, {{ bytes(one) }}, {{ (one.holds == "image") | lower }}, {{ (one.layout == "nhwc") | lower }}, {{ (one.color == "bgr") | lower }}, {{ sizes(one) | join(", ") }}},
{% endfor %}
};

const std::vector<Output> kOutputs = {
{% for one in contract.outputs %}
    {% raw %}{{% endraw %}{{ one.name | cpp }}, {{ one.scale if one in coded else 0 }}, {{ one.zero_point or 0 }}},
{% endfor %}
};

Bytes read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

// Returns the pixels of a PPM or PGM file, of any other its bytes.
Bytes pixels_of(const Bytes& file, const Input& input, const std::string& path) {
  if (file.size() < 2 || file[0] != 'P' || (file[1] != '6' && file[1] != '5')) return file;
  std::istringstream head(std::string(file.begin() + 2, file.begin() + std::min<size_t>(file.size(), 1024)));
  size_t numbers[3] = {0, 0, 0};
  for (size_t& number : numbers) {
    while ((head >> std::ws).peek() == '#') {
      std::string comment;
      std::getline(head, comment);
    }
    head >> number;
  }
  head.get();
  const size_t channels = file[1] == '6' ? 3 : 1;
  if (!head || numbers[0] != input.width || numbers[1] != input.height || numbers[2] != 255 || channels != input.channels)
    throw std::runtime_error(path + ": expected " + std::to_string(input.width) + " x " + std::to_string(input.height) +
                             " pixels of 8 bits and " + std::to_string(input.channels) + " channels");
  return Bytes(file.begin() + 2 + static_cast<std::ptrdiff_t>(head.tellg()), file.end());
}

// Brings pixels into the layout and the order of colors of an input.
Bytes arranged(const Bytes& pixels, const Input& input) {
  Bytes result(pixels.size());
  const size_t plane = input.height * input.width;
  for (size_t pixel = 0; pixel < plane; ++pixel)
    for (size_t channel = 0; channel < input.channels; ++channel) {
      const size_t to = input.reversed ? input.channels - 1 - channel : channel;
      result[input.channels_last ? pixel * input.channels + to : to * plane + pixel] =
          pixels[pixel * input.channels + channel];
    }
  return result;
}

Bytes load(const std::string& path, const Input& input) {
  Bytes bytes = read(path);
  if (input.image) bytes = pixels_of(bytes, input, path);
  if (bytes.size() != input.bytes)
    throw std::runtime_error(path + " holds " + std::to_string(bytes.size()) + " bytes, expected " +
                             std::to_string(input.bytes));
  return input.image ? arranged(bytes, input) : bytes;
}

// Adds the NPU to the options of a session.
std::string add_qnn(Ort::Env& env, Ort::SessionOptions& options, const std::string& provider,
                    const std::string& backend, const std::string& soc) {
  const std::string name = "QNNExecutionProvider";
  env.RegisterExecutionProviderLibrary(name.c_str(), provider);
  std::vector<Ort::ConstEpDevice> devices;
  for (const Ort::ConstEpDevice& device : env.GetEpDevices())
    if (device.EpName() == name) devices.push_back(device);
  if (devices.empty()) throw std::runtime_error(provider + " offers no device");
  std::unordered_map<std::string, std::string> settings = {% raw %}{{"backend_path", backend}}{% endraw %};
  if (!soc.empty()) settings["soc_model"] = soc;
  options.AddConfigEntry("session.record_ep_graph_assignment_info", "1");
  options.AddConfigEntry("session.disable_double_qdq_remover", "1");  // two roundings stay two
  options.AppendExecutionProvider_V2(env, devices, settings);
  return name;
}

int run(const std::vector<std::string>& arguments) {
  std::string folder = ".", provider, backend, soc;
  std::vector<std::string> files;
  for (size_t at = 0; at < arguments.size(); ++at) {
    const auto next = [&] {
      if (at + 1 == arguments.size()) throw std::runtime_error(arguments[at] + " needs a value");
      return arguments[++at];
    };
    if (arguments[at] == "--out") {
      folder = next();
    } else if (arguments[at] == "--qnn") {
      provider = next();
      backend = next();
    } else if (arguments[at] == "--soc") {
      soc = next();
    } else {
      files.push_back(arguments[at]);
    }
  }
  if (files.size() != kInputs.size() + 1)
    throw std::runtime_error("expected the model and " + std::to_string(kInputs.size()) + " files, got " +
                             std::to_string(files.size()));

  Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "host");
  Ort::SessionOptions options;
  std::string npu;
  if (provider.empty())  // every node as it is written: fused integer kernels saturate on CPUs without VNNI
    options.SetGraphOptimizationLevel(ORT_DISABLE_ALL);
  else
    npu = add_qnn(env, options, provider, backend, soc);
  Ort::Session session(env, std::filesystem::path(files[0]).c_str(), options);
  if (!npu.empty()) {
    bool found = false;
    for (const auto& part : session.GetEpGraphAssignmentInfo()) found = found || part.GetEpName() == npu;
    if (!found) throw std::runtime_error("no layer was compiled for the NPU: it would run on the CPU");
  }

  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::vector<Bytes> held;
  std::vector<Ort::Value> values;
  std::vector<const char*> input_names, output_names;
  for (size_t at = 0; at < kInputs.size(); ++at) {
    const Input& input = kInputs[at];
    held.push_back(load(files[at + 1], input));
    values.push_back(Ort::Value::CreateTensor(memory, held.back().data(), held.back().size(), input.shape.data(),
                                              input.shape.size(), input.type));
    input_names.push_back(input.name);
  }
  for (const Output& output : kOutputs) output_names.push_back(output.name);
  const auto results = session.Run(Ort::RunOptions{nullptr}, input_names.data(), values.data(), values.size(),
                                   output_names.data(), output_names.size());

  std::filesystem::create_directories(folder);
  for (size_t at = 0; at < results.size(); ++at) {
    const size_t bytes = results[at].GetTensorSizeInBytes();
    const auto path = std::filesystem::path(folder) / ("output" + std::to_string(at) + ".raw");
    std::ofstream file(path, std::ios::binary);
    file.write(static_cast<const char*>(results[at].GetTensorRawData()), static_cast<std::streamsize>(bytes));
    if (!file) throw std::runtime_error("cannot write " + path.string());
    std::cout << path.string() << ": " << kOutputs[at].name << ", " << bytes << " bytes";
    if (kOutputs[at].scale > 0)
      std::cout << ", numbers are (integer - " << kOutputs[at].zero_point << ") * " << kOutputs[at].scale;
    std::cout << "\n";
  }
  return 0;
}

}  // namespace

int main(int count, char** values) {
  try {
    return run({values + 1, values + count});
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
