#include "attention_runtime.h"

#include <torch/mps.h>

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <mutex>
#include <unordered_map>

// Generated at build time: kEmbeddedLibraries.
#include "metal_libraries.h"

namespace kvq::mps {
namespace {

std::string to_string(NSString* text) { return text ? [text UTF8String] : ""; }

std::string source_of(const AttentionKernel& kernel) {
  const std::string library = kernel.library();
  for (const auto* entry = runtime::kEmbeddedLibraries; entry->name; ++entry) {
    if (library == entry->name && entry->source) return entry->source + kernel.instantiation();
  }
  TORCH_CHECK(false, "[kvq.metal] the source of Metal library ", library, " is not embedded");
}

/// Throws with the compiler's message. Called under the lock.
runtime::Pipeline compile(const std::string& name, const std::string& source) {
  id<MTLComputePipelineState> state = nil;
  std::string failure;
  @autoreleasepool {
    __block id<MTLDevice> device = nil;
    dispatch_sync(torch::mps::get_dispatch_queue(), ^{
      device = [torch::mps::get_command_buffer() device];
    });
    MTLCompileOptions* options = [[MTLCompileOptions new] autorelease];
    options.languageVersion = MTLLanguageVersion3_1;
    // As in runtime.mm: NaN and infinity must keep their meaning.
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wdeprecated-declarations"
    options.fastMathEnabled = NO;
#pragma clang diagnostic pop
    NSError* error = nil;
    id<MTLLibrary> library =
        [device newLibraryWithSource:[NSString stringWithUTF8String:source.c_str()]
                             options:options
                               error:&error];
    id<MTLFunction> function = nil;
    if (library) {
      MTLFunctionConstantValues* values = [[MTLFunctionConstantValues new] autorelease];
      function = [library newFunctionWithName:[NSString stringWithUTF8String:name.c_str()]
                               constantValues:values
                                        error:&error];
    }
    if (function) state = [device newComputePipelineStateWithFunction:function error:&error];
    [function release];
    [library release];
    if (!state) {
      failure = to_string([[NSProcessInfo processInfo] operatingSystemVersionString]) + ": " +
                (error ? to_string([error localizedDescription]) : "no message from Metal");
    }
  }
  // Thrown after the pool: one that an exception passes through is not drained.
  TORCH_CHECK(state, "[kvq.metal] kernel ", name, " does not compile on macOS ", failure);
  return {(void*)state, static_cast<int64_t>([state maxTotalThreadsPerThreadgroup]),
          static_cast<int64_t>([state threadExecutionWidth]),
          static_cast<int64_t>([state staticThreadgroupMemoryLength])};
}

struct Binding {
  id<MTLBuffer> buffer;
  NSUInteger offset;
};

Binding bind(const runtime::Buffer& buffer) {
  const int64_t offset =
      buffer.tensor.storage_offset() * buffer.tensor.element_size() + buffer.byte_offset;
  // For an mps tensor torch keeps the MTLBuffer where other devices keep the address.
  return {(id<MTLBuffer>)const_cast<void*>(buffer.tensor.storage().data()),
          static_cast<NSUInteger>(offset)};
}

/// A launch with all looked up: encoding it can neither throw nor allocate.
struct Command {
  const AttentionLaunch* launch;
  std::vector<Binding> bindings;
};

}  // namespace

const runtime::Pipeline& attention_pipeline(const AttentionKernel& kernel) {
  // Leaked: at exit Metal may be gone before C++ statics are.
  static auto* mutex = new std::mutex;
  static auto* pipelines = new std::unordered_map<std::string, runtime::Pipeline>;
  const std::string name = kernel.name();
  std::lock_guard<std::mutex> lock(*mutex);
  const auto found = pipelines->find(name);
  if (found != pipelines->end()) return found->second;
  return pipelines->emplace(name, compile(name, source_of(kernel))).first->second;
}

void dispatch(const std::vector<AttentionLaunch>& launches) {
  std::vector<Command> commands;
  for (const AttentionLaunch& launch : launches) {
    TORCH_CHECK(launch.threads <= launch.pipeline->max_threads, "[kvq.metal] kernel ",
                launch.kernel, " needs ", launch.threads, " threads per threadgroup, and this GPU ",
                "admits ", launch.pipeline->max_threads);
    Command command{&launch, {}};
    for (const runtime::Buffer& buffer : launch.buffers) {
      const bool bound = buffer.tensor.defined() && buffer.tensor.numel() > 0;
      command.bindings.push_back(bind(bound ? buffer : launch.buffers.front()));
    }
    commands.push_back(std::move(command));
  }
  const std::vector<Command>* prepared = &commands;  // a block would copy the vector
  @autoreleasepool {
    dispatch_sync(torch::mps::get_dispatch_queue(), ^{
      id<MTLComputeCommandEncoder> encoder =
          [torch::mps::get_command_buffer() computeCommandEncoder];
      for (const Command& command : *prepared) {
        const AttentionLaunch& launch = *command.launch;
        [encoder setComputePipelineState:(id<MTLComputePipelineState>)launch.pipeline->state];
        NSUInteger index = 0;
        for (const Binding& binding : command.bindings) {
          [encoder setBuffer:binding.buffer offset:binding.offset atIndex:index++];
        }
        [encoder setBytes:launch.params.data() length:launch.params.size() atIndex:index];
        const runtime::Size& groups = launch.threadgroups;
        [encoder dispatchThreadgroups:MTLSizeMake(groups.x, groups.y, groups.z)
                threadsPerThreadgroup:MTLSizeMake(launch.threads, 1, 1)];
      }
      [encoder endEncoding];
    });
  }
}

}  // namespace kvq::mps
