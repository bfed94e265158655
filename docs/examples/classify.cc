// Classify one image with an exported file in ONNX Runtime's C++ API.
//
//   g++ -std=c++17 -O2 classify.cc -I onnxruntime/include -L onnxruntime/lib -lonnxruntime -o classify
//   ./classify model.int8.onnx photo.ppm
//
// The image is a binary PPM (P6) of the network's size: convert photo.jpg -resize 64x64! photo.ppm
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

// The numbers of one key of the file's preprocessing, which is flat JSON: "mean":[0.49,0.48,0.45]
std::vector<float> numbers(const std::string& json, const std::string& key) {
  const auto at = json.find("\"" + key + "\"");
  if (at == std::string::npos) throw std::runtime_error("the file's preprocessing has no " + key);
  const auto open = json.find('[', at), close = json.find(']', open);
  std::istringstream text(json.substr(open + 1, close - open - 1));
  std::vector<float> values;
  for (std::string part; std::getline(text, part, ',');) values.push_back(std::stof(part));
  return values;
}

// A P6 image as bytes in rows of RGB.
std::vector<std::uint8_t> read_ppm(const std::string& path, int height, int width) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int w = 0, h = 0, largest = 0;
  file >> magic >> w >> h >> largest;
  file.get();
  if (magic != "P6" || w != width || h != height || largest != 255)
    throw std::runtime_error(path + " is no 8-bit P6 image of " + std::to_string(width) + "x" + std::to_string(height));
  std::vector<std::uint8_t> pixels(3 * static_cast<std::size_t>(w) * h);
  file.read(reinterpret_cast<char*>(pixels.data()), static_cast<std::streamsize>(pixels.size()));
  if (!file) throw std::runtime_error(path + " is cut off");
  return pixels;
}

int main(int argc, char** argv) try {
  if (argc != 3) throw std::runtime_error("usage: classify model.int8.onnx photo.ppm");
  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "classify");
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(1);
  Ort::Session session(env, argv[1], options);

  Ort::AllocatorWithDefaultOptions allocator;
  const auto metadata = session.GetModelMetadata();
  const auto found = metadata.LookupCustomMetadataMapAllocated("edgecompress.preprocess", allocator);
  if (!found) throw std::runtime_error("the file carries no preprocessing");
  const std::string how = found.get();
  const auto size = numbers(how, "size"), mean = numbers(how, "mean"), std_dev = numbers(how, "std");
  const int height = static_cast<int>(size[0]), width = static_cast<int>(size[1]);

  const auto pixels = read_ppm(argv[2], height, width);
  std::vector<float> input(pixels.size());  // planes: all red, all green, all blue
  for (int i = 0; i < height * width; ++i)
    for (int c = 0; c < 3; ++c) input[c * height * width + i] = (pixels[3 * i + c] / 255.0f - mean[c]) / std_dev[c];

  const std::array<std::int64_t, 4> shape{1, 3, height, width};
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  Ort::Value tensor = Ort::Value::CreateTensor<float>(memory, input.data(), input.size(), shape.data(), shape.size());
  const auto input_name = session.GetInputNameAllocated(0, allocator);
  const auto output_name = session.GetOutputNameAllocated(0, allocator);
  const char* inputs[] = {input_name.get()};
  const char* outputs[] = {output_name.get()};
  const auto results = session.Run(Ort::RunOptions{nullptr}, inputs, &tensor, 1, outputs, 1);

  const float* logits = results[0].GetTensorData<float>();
  const auto classes = results[0].GetTensorTypeAndShapeInfo().GetElementCount();
  std::cout << "class " << std::max_element(logits, logits + classes) - logits << "\n";
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 1;
}
