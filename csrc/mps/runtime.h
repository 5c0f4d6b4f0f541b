// Host runtime of the Metal kernels: libraries, pipelines and encoding.
//
// An op's .mm file checks its arguments, allocates its outputs and describes the launch; the
// runtime does the rest:
//
//   runtime::dispatch({
//       .library = "affine:int4_g64",                  // metal/affine.metal
//       .kernel = "kvq_quantize_half_int4_g64",
//       .constants = {{"has_signs", true}},            // [[function_constant]]s, by name
//       .buffers = {x, codes, scales, biases},         // [[buffer(0)]] ... [[buffer(3)]]
//       .params = params,                              // [[buffer(4)]]: one struct, at most 4 KB
//       .threads = {groups, rows, 1},                  // or .threadgroups
//       .threads_per_threadgroup = {64, 1, 1},
//   });
//
// What a kernel author may rely on:
//  - A tensor is bound as its storage plus its byte offset, so views are fine; strides are the
//    kernel's business (put them in the params). Buffer{tensor, bytes} adds a further byte offset.
//  - An undefined or empty tensor is bound to a small dummy buffer: an optional argument needs no
//    special case, but the kernel must not read it (guard it by a function constant or a param).
//  - After a colon .library names a line of the table at the end of the .metal file, which begins
//    with KVQ_CODEC("that name". The others are left out: a library is compiled on the user's Mac
//    when it is first used, so it should be small. One that the build compiled has all of them.
//  - .instantiation is appended to the library's source, which is then compiled for this kernel
//    alone: for templates with too many variants to compile them all on a user's Mac, e.g.
//    "template [[host_name(\"name\")]] [[kernel]] decltype(f<half, 64>) f<half, 64>;".
//  - .params is copied when the Launch is made, and bound to the index after the last buffer.
//    Without params nothing is bound there.
//  - Several launches given together go into one encoder and run in order; each sees all that the
//    previous ones wrote. So a merge pass needs no second op call:
//      runtime::dispatch({partial_pass, merge_pass});
//  - Nothing is committed and nothing waits. Work runs when torch commits its stream.
//  - Every failure (unknown kernel, compile error, threadgroup over the pipeline's limit) is a
//    c10::Error raised before anything was encoded: a refused call leaves no trace.
//  - All functions may be called from any thread, but not from inside a dispatch_sync block.
//
// Threadgroup sizes: ask pipeline(...).max_threads, which can be below 1024 for a kernel that needs
// many registers. A zero grid is allowed and encodes nothing.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace kvq::runtime {

/// One entry of the table in the generated header metal_libraries.h, which ends with an entry whose
/// name is nullptr.
struct EmbeddedLibrary {
  const char* name;    ///< stem of the .metal file
  const char* source;  ///< flattened Metal source, compiled at first use
  /// Output of `xcrun metal` where the build had it, else nullptr: loaded instead of compiling the
  /// source, unless a launch instantiates a kernel.
  const unsigned char* metallib;
  size_t metallib_size;
};

/// Value of one [[function_constant]], addressed by the constant's name.
struct Constant {
  enum class Type { kBool, kInt, kUInt, kFloat };

  Constant(const char* name, bool value) : name(name), type(Type::kBool), bits(value) {}
  Constant(const char* name, int32_t value)
      : name(name), type(Type::kInt), bits(static_cast<uint32_t>(value)) {}
  Constant(const char* name, uint32_t value) : name(name), type(Type::kUInt), bits(value) {}
  Constant(const char* name, float value)
      : name(name), type(Type::kFloat), bits(std::bit_cast<uint32_t>(value)) {}

  const char* name;
  Type type;
  uint32_t bits;  ///< the value, little endian: a bool is its first byte
};

/// A tensor's storage, from the tensor's first element plus `byte_offset` on.
struct Buffer {
  Buffer(at::Tensor tensor, int64_t byte_offset = 0)  // NOLINT(google-explicit-constructor)
      : tensor(std::move(tensor)), byte_offset(byte_offset) {}

  at::Tensor tensor;
  int64_t byte_offset;
};

/// Bytes of the parameter struct that the host shares with the kernel.
class Params {
 public:
  /// What setBytes takes at most.
  static constexpr size_t kMaxBytes = 4096;

  Params() = default;
  template <typename T>
  Params(const T& value) {  // NOLINT(google-explicit-constructor)
    static_assert(std::is_trivially_copyable_v<T> && std::is_standard_layout_v<T>,
                  "params must be a plain struct");
    static_assert(sizeof(T) <= kMaxBytes, "params must fit in 4096 bytes");
    const auto* begin = reinterpret_cast<const std::byte*>(&value);
    bytes_.append(begin, begin + sizeof(T));
  }

  const std::byte* data() const { return bytes_.data(); }
  size_t size() const { return bytes_.size(); }

 private:
  c10::SmallVector<std::byte, 256> bytes_;
};

/// Extent of a grid or a threadgroup; at most 2^32 - 1 per dimension.
struct Size {
  int64_t x = -1;  ///< negative: not given
  int64_t y = 1;
  int64_t z = 1;

  bool is_given() const { return x >= 0; }
  int64_t count() const { return x * y * z; }
};

/// One kernel launch. Exactly one of `threads` and `threadgroups` is given.
struct Launch {
  std::string library;
  std::string kernel;
  std::string instantiation{};
  std::vector<Constant> constants{};
  std::vector<Buffer> buffers{};
  Params params{};
  Size threads{};       ///< grid in threads; the last threadgroups may be smaller
  Size threadgroups{};  ///< grid in threadgroups
  Size threads_per_threadgroup{};
  std::vector<int64_t> threadgroup_memory{};  ///< bytes of [[threadgroup(i)]], multiples of 16
};

/// Limits of a compiled kernel.
struct Pipeline {
  void* state;                 ///< id<MTLComputePipelineState>, never released
  int64_t max_threads;         ///< most threads in a threadgroup
  int64_t simd_width;          ///< threads in a simdgroup: 32 on every Apple GPU
  int64_t threadgroup_memory;  ///< bytes that the kernel's own threadgroup arrays take
};

/// Encodes the launch on torch's current MPS command buffer.
void dispatch(const Launch& launch);
/// Encodes several launches, in order, in one encoder.
void dispatch(std::initializer_list<Launch> launches);

/// The pipeline of a kernel, compiled on first use and kept for the life of the process.
const Pipeline& pipeline(const std::string& library, const std::string& kernel,
                         const std::vector<Constant>& constants = {},
                         const std::string& instantiation = "");

/// What Metal calls the GPU.
std::string device_name();
/// Names of the embedded libraries, for `verify` and for tests.
std::vector<std::string> library_names();
/// Names of the kernels that an embedded library holds, instantiations left out; compiles it.
std::vector<std::string> kernel_names(const std::string& library);

}  // namespace kvq::runtime
