// What a C++ program needs of TensorRT (10.3 or later) before it steps a model: the engine of a file, its tensors, memory.
// The program is in docs/embedding.md.
#pragma once

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace trt {

struct Tensor {
  std::string name;
  bool input, state;  // a state is an input X whose next value is the output X.out
  nvinfer1::Dims shape;  // of one stream, where the batch is dynamic
  size_t count, bytes;
};

class Engine {
 public:
  explicit Engine(const char* path) {
    std::ifstream file(path, std::ios::binary);
    const std::vector<char> plan{std::istreambuf_iterator<char>(file), {}};
    runtime_.reset(nvinfer1::createInferRuntime(log_));
    if (runtime_) engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
    if (!engine_) throw std::runtime_error(std::string(path) + " is no engine of this TensorRT and GPU");
  }

  std::unique_ptr<nvinfer1::IExecutionContext> context() {
    return std::unique_ptr<nvinfer1::IExecutionContext>(engine_->createExecutionContext());
  }

  // All but the outputs X.out: those belong to the states X.
  std::vector<Tensor> tensors() const {
    std::vector<Tensor> found;
    for (int i = 0; i < engine_->getNbIOTensors(); ++i) {
      const char* name = engine_->getIOTensorName(i);
      const size_t length = std::strlen(name);
      if (length > 4 && std::strcmp(name + length - 4, ".out") == 0) continue;
      const bool input = engine_->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT;
      Tensor tensor{name, input, input && std::strcmp(name, "token") != 0, engine_->getTensorShape(name), 1, 0};
      for (int d = 0; d < tensor.shape.nbDims; ++d)
        tensor.count *= tensor.shape.d[d] = std::max<int64_t>(tensor.shape.d[d], 1);
      tensor.bytes = tensor.count * size_of(engine_->getTensorDataType(name));
      found.push_back(tensor);
    }
    return found;
  }

 private:
  struct Log : nvinfer1::ILogger {
    void log(Severity severity, const char* text) noexcept override {
      if (severity <= Severity::kWARNING) std::fprintf(stderr, "%s\n", text);
    }
  };

  static size_t size_of(nvinfer1::DataType type) {
    switch (type) {
      case nvinfer1::DataType::kINT64: return 8;
      case nvinfer1::DataType::kFLOAT:
      case nvinfer1::DataType::kINT32: return 4;
      case nvinfer1::DataType::kHALF:
      case nvinfer1::DataType::kBF16: return 2;
      default: throw std::runtime_error("a tensor of a step is int64, int32, float32, float16 or bfloat16");
    }
  }

  Log log_;  // outlives what reports to it
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
};

// Zeros that host and GPU reach by one address; the host only while the GPU is idle.
inline void* managed(size_t bytes) {
  void* block = nullptr;
  if (cudaMallocManaged(&block, bytes) != cudaSuccess) throw std::runtime_error("the GPU has not enough memory");
  std::memset(block, 0, bytes);
  return block;
}

}  // namespace trt
