#include "runtime.h"

#include <torch/mps.h>

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <mutex>
#include <unordered_map>

// Generated at build time: kEmbeddedLibraries.
#include "metal_libraries.h"

namespace kvq::runtime {
namespace {

constexpr NSUInteger kPlaceholderBytes = 256;
constexpr size_t kMaxBuffers = 31;

/// The device that torch's stream runs on. Never released.
id<MTLDevice> device() {
  static id<MTLDevice> device = [] {
    __block id<MTLDevice> found = nil;
    @autoreleasepool {
      dispatch_sync(torch::mps::get_dispatch_queue(), ^{
        found = [[torch::mps::get_command_buffer() device] retain];
      });
    }
    return found;
  }();
  return device;
}

/// Bound where a launch has an undefined or empty tensor, so that no argument is left unbound.
id<MTLBuffer> placeholder() {
  static id<MTLBuffer> buffer = [] {
    id<MTLBuffer> made = [device() newBufferWithLength:kPlaceholderBytes
                                               options:MTLResourceStorageModeShared];
    std::memset([made contents], 0, kPlaceholderBytes);
    return made;
  }();
  return buffer;
}

std::string to_string(NSString* text) { return text ? [text UTF8String] : ""; }

std::string os_version() {
  return to_string([[NSProcessInfo processInfo] operatingSystemVersionString]);
}

std::string message_of(NSError* error) {
  return error ? to_string([error localizedDescription]) : "no message from Metal";
}

const EmbeddedLibrary& find_embedded(const std::string& name) {
  for (const EmbeddedLibrary* entry = kEmbeddedLibraries; entry->name; ++entry) {
    if (name == entry->name) return *entry;
  }
  TORCH_CHECK(false, "[kvq.metal] no embedded Metal library is named ", name);
}

MTLCompileOptions* compile_options() {
  MTLCompileOptions* options = [[MTLCompileOptions new] autorelease];
  options.languageVersion = MTLLanguageVersion3_1;
  // NaN and infinity must keep their meaning; kernels ask for fast:: functions where they want
  // them. mathMode would need the macOS 15 SDK, and this does the same.
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wdeprecated-declarations"
  options.fastMathEnabled = NO;
#pragma clang diagnostic pop
  return options;
}

/// The source without those lines of its table that are not `wanted`'s; all of it if that is "".
std::string with_one_line(const std::string& source, const std::string& wanted) {
  static const std::string kLine = "\nKVQ_CODEC(\"";
  const size_t table = source.find(kLine);
  if (wanted.empty() || table == std::string::npos) return source;
  const size_t line = source.find(kLine + wanted + "\"", table);
  TORCH_CHECK(line != std::string::npos, "[kvq.metal] no embedded Metal library has a line for ",
              wanted);
  return source.substr(0, table) + source.substr(line, source.find('\n', line + 1) - line) + "\n";
}

id<MTLLibrary> compile(const std::string& source, NSError** error) {
  return [device() newLibraryWithSource:[NSString stringWithUTF8String:source.c_str()]
                                options:compile_options()
                                  error:error];
}

id<MTLLibrary> load(const EmbeddedLibrary& embedded, NSError** error) {
  dispatch_data_t data = dispatch_data_create(embedded.metallib, embedded.metallib_size, nullptr,
                                              DISPATCH_DATA_DESTRUCTOR_DEFAULT);
  id<MTLLibrary> library = [device() newLibraryWithData:data error:error];
  dispatch_release(data);
  return library;
}

MTLDataType data_type(Constant::Type type) {
  switch (type) {
    case Constant::Type::kBool:
      return MTLDataTypeBool;
    case Constant::Type::kInt:
      return MTLDataTypeInt;
    case Constant::Type::kUInt:
      return MTLDataTypeUInt;
    case Constant::Type::kFloat:
      return MTLDataTypeFloat;
  }
}

/// Compiled libraries and pipelines. Leaked: at exit Metal may be gone before C++ statics are.
class Cache {
 public:
  static Cache& instance() {
    static auto* cache = new Cache;
    return *cache;
  }

  id<MTLLibrary> library(const std::string& name) {
    std::lock_guard<std::mutex> lock(mutex_);
    return library_locked(name, /*instantiation=*/"", /*wanted_by=*/"");
  }

  const Pipeline& pipeline(const std::string& library, const std::string& kernel,
                           const std::vector<Constant>& constants,
                           const std::string& instantiation) {
    std::string key = library + '\0' + kernel + '\0' + instantiation;
    for (const Constant& constant : constants) {
      key.append(1, '\0').append(constant.name).append(1, '\0');
      key.append(1, static_cast<char>(constant.type));
      key.append(reinterpret_cast<const char*>(&constant.bits), sizeof(constant.bits));
    }
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = pipelines_.find(key);
    if (found != pipelines_.end()) return found->second;
    return pipelines_.emplace(key, make_pipeline(library, kernel, constants, instantiation))
        .first->second;
  }

 private:
  id<MTLLibrary> library_locked(const std::string& name, const std::string& instantiation,
                                const std::string& wanted_by) {
    const std::string key = name + '\0' + instantiation;
    auto found = libraries_.find(key);
    if (found != libraries_.end()) return found->second;
    const size_t stem = std::min(name.find(':'), name.size());
    const EmbeddedLibrary& embedded = find_embedded(name.substr(0, stem));
    std::string source;
    if (!embedded.metallib || !instantiation.empty()) {
      const std::string line = name.substr(std::min(stem + 1, name.size()));
      source = with_one_line(embedded.source, line) + instantiation;
    }
    id<MTLLibrary> library = nil;
    std::string failure;
    @autoreleasepool {
      NSError* error = nil;
      library = source.empty() ? load(embedded, &error) : compile(source, &error);
      if (!library) failure = os_version() + ": " + message_of(error);
    }
    // Thrown after the pool: one that an exception passes through is not drained.
    TORCH_CHECK(library, "[kvq.metal] ", wanted_by.empty() ? "" : "kernel " + wanted_by + ": ",
                "Metal library ", name, " does not compile on macOS ", failure);
    libraries_.emplace(key, library);
    return library;
  }

  Pipeline make_pipeline(const std::string& library, const std::string& kernel,
                         const std::vector<Constant>& constants, const std::string& instantiation) {
    id<MTLLibrary> compiled = library_locked(library, instantiation, kernel);
    id<MTLComputePipelineState> state = nil;
    std::string failure;
    @autoreleasepool {
      NSError* error = nil;
      MTLFunctionConstantValues* values = [[MTLFunctionConstantValues new] autorelease];
      for (const Constant& constant : constants) {
        [values setConstantValue:&constant.bits
                            type:data_type(constant.type)
                        withName:[NSString stringWithUTF8String:constant.name]];
      }
      id<MTLFunction> function =
          [compiled newFunctionWithName:[NSString stringWithUTF8String:kernel.c_str()]
                         constantValues:values
                                  error:&error];
      if (function) {
        state = [device() newComputePipelineStateWithFunction:function error:&error];
        [function release];
      }
      if (!state) failure = os_version() + ": " + message_of(error);
    }
    TORCH_CHECK(state, "[kvq.metal] kernel ", kernel, " of Metal library ", library,
                " gives no pipeline on macOS ", failure);
    return {(void*)state, static_cast<int64_t>([state maxTotalThreadsPerThreadgroup]),
            static_cast<int64_t>([state threadExecutionWidth]),
            static_cast<int64_t>([state staticThreadgroupMemoryLength])};
  }

  std::mutex mutex_;
  std::unordered_map<std::string, id<MTLLibrary>> libraries_;
  std::unordered_map<std::string, Pipeline> pipelines_;  // references to its values stay valid
};

struct Binding {
  id<MTLBuffer> buffer;
  NSUInteger offset;
};

/// A launch with everything looked up and checked: encoding it can neither throw nor allocate.
struct Command {
  const Launch* launch;
  id<MTLComputePipelineState> state;
  c10::SmallVector<Binding, 16> bindings;
  MTLSize grid;
  MTLSize threadgroup;
  bool grid_in_threads;
};

Binding bind(const Buffer& buffer, size_t index, const Launch& launch) {
  if (!buffer.tensor.defined() || buffer.tensor.numel() == 0) return {placeholder(), 0};
  TORCH_CHECK(buffer.tensor.is_mps(), "[kvq.metal] kernel ", launch.kernel, ": buffer ", index,
              " must be an mps tensor, got one on ", buffer.tensor.device());
  const auto offset =
      buffer.tensor.storage_offset() * static_cast<int64_t>(buffer.tensor.element_size()) +
      buffer.byte_offset;
  const auto bytes = static_cast<int64_t>(buffer.tensor.storage().nbytes());
  TORCH_CHECK(offset >= 0 && offset < bytes, "[kvq.metal] kernel ", launch.kernel, ": buffer ",
              index, " starts at byte ", offset, " of a storage of ", bytes, " bytes");
  // For an mps tensor torch keeps the MTLBuffer where other devices keep the address.
  return {(id<MTLBuffer>)const_cast<void*>(buffer.tensor.storage().data()),
          static_cast<NSUInteger>(offset)};
}

MTLSize to_metal(const Size& size, const char* what, const Launch& launch) {
  for (int64_t extent : {size.x, size.y, size.z}) {
    TORCH_CHECK(extent >= 0 && extent <= std::numeric_limits<uint32_t>::max(),
                "[kvq.metal] kernel ", launch.kernel, ": ", what,
                " must be in 0..2^32-1 per dimension, got (", size.x, ", ", size.y, ", ", size.z,
                ")");
  }
  return MTLSizeMake(size.x, size.y, size.z);
}

const Size& grid_of(const Launch& launch) {
  return launch.threads.is_given() ? launch.threads : launch.threadgroups;
}

Command prepare(const Launch& launch) {
  const Pipeline& pipeline =
      runtime::pipeline(launch.library, launch.kernel, launch.constants, launch.instantiation);
  Command command{&launch, (id<MTLComputePipelineState>)pipeline.state};

  TORCH_CHECK(launch.threads.is_given() != launch.threadgroups.is_given(), "[kvq.metal] kernel ",
              launch.kernel, ": give either threads or threadgroups");
  TORCH_CHECK(launch.threads_per_threadgroup.is_given(), "[kvq.metal] kernel ", launch.kernel,
              ": threads_per_threadgroup is missing");
  command.grid_in_threads = launch.threads.is_given();
  command.grid = to_metal(grid_of(launch), "the grid", launch);
  command.threadgroup = to_metal(launch.threads_per_threadgroup, "the threadgroup", launch);
  const int64_t threads = launch.threads_per_threadgroup.count();
  TORCH_CHECK(threads >= 1 && threads <= pipeline.max_threads, "[kvq.metal] kernel ", launch.kernel,
              ": threads_per_threadgroup must be in 1..", pipeline.max_threads,
              " on this GPU, got ", threads);

  int64_t memory = pipeline.threadgroup_memory;
  for (int64_t bytes : launch.threadgroup_memory) {
    TORCH_CHECK(bytes > 0 && bytes % 16 == 0, "[kvq.metal] kernel ", launch.kernel,
                ": threadgroup_memory must be positive multiples of 16 bytes, got ", bytes);
    memory += bytes;
  }
  const auto limit = static_cast<int64_t>([device() maxThreadgroupMemoryLength]);
  TORCH_CHECK(memory <= limit, "[kvq.metal] kernel ", launch.kernel, ": needs ", memory,
              " bytes of threadgroup memory, and this GPU has ", limit);

  TORCH_CHECK(launch.buffers.size() < kMaxBuffers, "[kvq.metal] kernel ", launch.kernel, ": ",
              launch.buffers.size(), " buffers and the params need more than ", kMaxBuffers,
              " indices");
  for (size_t i = 0; i < launch.buffers.size(); ++i) {
    command.bindings.push_back(bind(launch.buffers[i], i, launch));
  }
  return command;
}

void encode(const Command& command, id<MTLComputeCommandEncoder> encoder) {
  const Launch& launch = *command.launch;
  [encoder setComputePipelineState:command.state];
  NSUInteger index = 0;
  for (const Binding& binding : command.bindings) {
    [encoder setBuffer:binding.buffer offset:binding.offset atIndex:index++];
  }
  if (launch.params.size() > 0) {
    [encoder setBytes:launch.params.data() length:launch.params.size() atIndex:index];
  }
  index = 0;
  for (int64_t bytes : launch.threadgroup_memory) {
    [encoder setThreadgroupMemoryLength:static_cast<NSUInteger>(bytes) atIndex:index++];
  }
  if (command.grid_in_threads) {
    [encoder dispatchThreads:command.grid threadsPerThreadgroup:command.threadgroup];
  } else {
    [encoder dispatchThreadgroups:command.grid threadsPerThreadgroup:command.threadgroup];
  }
}

void run(const Launch* begin, const Launch* end) {
  c10::SmallVector<Command, 2> commands;
  for (const Launch* launch = begin; launch != end; ++launch) {
    if (grid_of(*launch).count() != 0) commands.push_back(prepare(*launch));
  }
  if (commands.empty()) return;
  const c10::SmallVector<Command, 2>* prepared = &commands;  // a block would copy the vector
  @autoreleasepool {
    dispatch_sync(torch::mps::get_dispatch_queue(), ^{
      // Torch has ended its own encoder when this returns, so ours is the only open one.
      id<MTLComputeCommandEncoder> encoder =
          [torch::mps::get_command_buffer() computeCommandEncoder];
      for (const Command& command : *prepared) encode(command, encoder);
      [encoder endEncoding];
    });
  }
}

}  // namespace

void dispatch(const Launch& launch) { run(&launch, &launch + 1); }

void dispatch(std::initializer_list<Launch> launches) { run(launches.begin(), launches.end()); }

const Pipeline& pipeline(const std::string& library, const std::string& kernel,
                         const std::vector<Constant>& constants, const std::string& instantiation) {
  return Cache::instance().pipeline(library, kernel, constants, instantiation);
}

std::string device_name() {
  @autoreleasepool {
    return to_string([device() name]);
  }
}

std::vector<std::string> library_names() {
  std::vector<std::string> names;
  for (const EmbeddedLibrary* entry = kEmbeddedLibraries; entry->name; ++entry) {
    names.emplace_back(entry->name);
  }
  return names;
}

std::vector<std::string> kernel_names(const std::string& library) {
  id<MTLLibrary> compiled = Cache::instance().library(library);
  std::vector<std::string> names;
  @autoreleasepool {
    NSArray* functions = [compiled functionNames];
    for (NSUInteger i = 0; i < [functions count]; ++i) {
      names.push_back(to_string([functions objectAtIndex:i]));
    }
  }
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace kvq::runtime
