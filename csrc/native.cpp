// resnet_fast._native: what was built, what this CPU can do, and what tells that a module or its
// weights have changed. No torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "build_info.h"
#include "cpu/isa.h"
#include "cuda/conv_choice.h"
#include "cuda_variants.h"
#include "guard.h"
#include "math/fingerprint.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = std::string("gcc ") + __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  for (const auto& [key, value] : kBuildInfo) {
    if (*value == '\0') {
      info[key] = py::none();
    } else {
      info[key] = value;
    }
  }
  info["cuda_resources_absence"] = py::none();
  if (*kCudaVariantsAbsence != '\0') info["cuda_resources_absence"] = kCudaVariantsAbsence;
  return info;
}

std::map<std::string, bool> cpu_features() {
  std::map<std::string, bool> found;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
#define RF_FEATURE(name) found[name] = __builtin_cpu_supports(name) != 0
  RF_FEATURE("sse4.2");
  RF_FEATURE("avx");
  RF_FEATURE("avx2");
  RF_FEATURE("fma");
  RF_FEATURE("avx512f");
  RF_FEATURE("avx512bw");
  RF_FEATURE("avx512vl");
  RF_FEATURE("avx512dq");
  RF_FEATURE("avx512vnni");
  RF_FEATURE("avx512bf16");
#undef RF_FEATURE
  // AMX: leaf 7 says the CPU has it; that the system grants its state is the kernel's affair.
  unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  found["amx_bf16"] = (edx >> 22) & 1u;
  found["amx_tile"] = (edx >> 24) & 1u;
  found["amx_int8"] = (edx >> 25) & 1u;
#endif
  return found;
}

std::string current_isa() {
  switch (resnet_fast::cpu::current_isa()) {
    case resnet_fast::cpu::Isa::avx512:
      return "avx512";
    case resnet_fast::cpu::Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

py::list kernel_variants() {
  struct Row {
    const char* op;
    const char* name;
    std::vector<const char*> isas;
  };
  const std::vector<const char*> pointwise = {"baseline", "avx2"};
  const std::vector<const char*> tiled = {"baseline", "avx2", "avx512"};
  const std::vector<const char*> paired = {"baseline", "avx2", "avx512", "avx512bf16"};
  const std::vector<const char*> dotted = {"baseline", "avx2", "avx512", "avx512vnni"};
  const std::vector<Row> cpu = {
      {"conv_bn_act", "panel_gemm", tiled},   {"conv_bn_act", "depthwise", tiled},
      {"conv_bn_act", "direct", paired},      {"conv_bn_act", "winograd2", tiled},
      {"conv_bn_act", "winograd4", tiled},    {"conv_bn_act", "grouped", tiled},
      {"conv_bn_act", "int8", dotted},        {"conv_bn_act", "int8_grouped", dotted},
      {"bn_act", "affine", pointwise},        {"add_act", "affine", pointwise},
      {"bn_act_train", "two_pass", pointwise}};
  py::list rows;
  const auto add = [&](const std::string& op, const std::string& name, const char* device,
                       const std::string& isa) {
    py::dict row;
    row["name"] = std::string(device) + "/" + op + "/" + name + "/" + isa;
    row["op"] = op;
    row["device"] = device;
    row["isa"] = isa;
    rows.append(row);
    return row;
  };
  for (const Row& row : cpu) {
    for (const char* isa : row.isas) add(row.op, row.name, "cpu", isa);
  }
  const auto known = [](int figure) -> py::object {
    if (figure < 0) return py::none();
    return py::int_(figure);
  };
  for (const CudaVariant& variant : kCudaVariants) {
    py::dict row = add(variant.op, variant.kernel, "cuda", variant.arch);
    row["source"] = variant.source;
    row["registers"] = variant.registers;
    row["shared"] = variant.shared;
    row["dynamic_shared"] = known(variant.dynamic_shared);
    row["local"] = variant.local;
    row["threads"] = known(variant.threads);
    row["blocks"] = known(variant.blocks);
    row["warps"] = known(variant.warps);
  }
  return rows;
}

// A convolution of that many outputs a filter; the filters' shape is K, C / groups, R, S.
resnet_fast::ConvShape conv_shape(int64_t pixels, const std::vector<int>& filters, int groups) {
  if (filters.size() != 4 || groups < 1 || pixels < 0 || pixels > INT32_MAX) {
    throw std::invalid_argument("filters: expected four dimensions; groups: expected 1 or more");
  }
  resnet_fast::ConvShape shape{};
  shape.batch = shape.out_height = 1;
  shape.out_width = static_cast<int>(pixels);
  shape.filters = filters[0];
  shape.group_channels = filters[1];
  shape.kernel_h = filters[2];
  shape.kernel_w = filters[3];
  shape.groups = groups;
  return shape;
}

// The fingerprint of several buffers: order and length count, too.
uint64_t fingerprint(const std::vector<std::pair<uint64_t, uint64_t>>& buffers) {
  uint64_t h = buffers.size();
  for (size_t i = 0; i < buffers.size(); ++i) {
    const auto [address, length] = buffers[i];
    if (address == 0 && length > 0) {
      throw std::invalid_argument("fingerprint: null address with a length");
    }
    if (i + 1 < buffers.size()) {
      const auto [next, bytes] = buffers[i + 1];
      resnet_fast::prefetch_fingerprint(reinterpret_cast<const unsigned char*>(next), bytes);
    }
    const auto* bytes = reinterpret_cast<const unsigned char*>(address);
    h = resnet_fast::mix_bits(h ^ resnet_fast::fingerprint(bytes, length));
  }
  return h;
}

// Live memory and the fingerprint it had: one call tells whether it still has it.
class Watch {
 public:
  explicit Watch(std::vector<std::pair<uint64_t, uint64_t>> buffers)
      : buffers_(std::move(buffers)), value_(fingerprint(buffers_)) {}
  bool unchanged() const { return fingerprint(buffers_) == value_; }

 private:
  std::vector<std::pair<uint64_t, uint64_t>> buffers_;
  uint64_t value_;
};

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Build info, CPU features, kernel variants, and what tells that a module has changed.";
  m.def("build_info", &build_info, "How the native parts were built; None where absent.");
  m.def("cpu_features", &cpu_features, "Instruction sets of this CPU.");
  m.def("current_isa", &current_isa, "The instruction set that the CPU kernels use here.");
  m.def("kernel_variants", &kernel_variants,
        "Compiled kernels: name, op, device, isa; of CUDA also source, registers, shared and local "
        "memory, threads a block, blocks and warps at once, None where unknown.");
  m.def(
      "conv_variant",
      [](int element_bytes, int64_t pixels, const std::vector<int>& filters, int groups,
         const std::string& tile) {
        return resnet_fast::conv_variant(element_bytes, conv_shape(pixels, filters, groups), tile);
      },
      py::arg("element_bytes"), py::arg("pixels"), py::arg("filters"), py::arg("groups"),
      py::arg("tile"),
      "Tile, parts of the reduction and bytes of a copy that the CUDA convolution takes.");
  m.def(
      "conv_stats_variant",
      [](int element_bytes, int64_t pixels, const std::vector<int>& filters, int groups) {
        return resnet_fast::conv_stats_variant(element_bytes, conv_shape(pixels, filters, groups));
      },
      py::arg("element_bytes"), py::arg("pixels"), py::arg("filters"), py::arg("groups"),
      "Tile and bytes of a copy that conv_stats takes on CUDA.");
  m.def("fingerprint", &fingerprint, py::arg("buffers"),
        "Change detector over (address, bytes) pairs of live CPU memory, as a 64-bit integer.");
  py::class_<Watch>(m, "Watch", "The fingerprint of live CPU memory, to be compared again.")
      .def(py::init<std::vector<std::pair<uint64_t, uint64_t>>>(), py::arg("buffers"))
      .def("unchanged", &Watch::unchanged,
           "Whether the memory, which must still be live, is as it was.");
  resnet_fast::define_guard(m);
}
