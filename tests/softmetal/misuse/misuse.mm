// Host code with planted faults: each is one the software device has to stop.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>
#include <torch/mps.h>

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <functional>
#include <map>
#include <string>

#include "mps/runtime.h"

#include "metal_libraries.h"

@protocol NoSuchProtocol
- (void)noSuchMethod;
@end

namespace {

struct Params {
  float scale;
  uint32_t count;
};

constexpr Params kParams{2.0f, 8};
constexpr int64_t kCount = 8;

const char* source(const std::string& name = "misuse") {
  for (const auto& library : kvq::runtime::kEmbeddedLibraries) {
    if (library.name && name == library.name) return library.source;
  }
  return name.c_str();  // the source itself
}

id<MTLDevice> device() {
  static id<MTLDevice> device = MTLCreateSystemDefaultDevice();
  return device;
}

NSString* text(const std::string& string) { return [NSString stringWithUTF8String:string.c_str()]; }

id<MTLLibrary> compile(const char* code, MTLCompileOptions* options, std::string& error) {
  NSError* reported = nil;
  id<MTLLibrary> library = [device() newLibraryWithSource:text(code)
                                                  options:options
                                                    error:&reported];
  if (!library) error = [[reported localizedDescription] UTF8String];
  return library;
}

id<MTLLibrary> library() {
  static id<MTLLibrary> library = [] {
    std::string error;
    id<MTLLibrary> made = compile(source(), nil, error);
    TORCH_CHECK(made, error);
    return made;
  }();
  return library;
}

id<MTLComputePipelineState> pipeline(const char* name) {
  NSError* error = nil;
  id<MTLFunction> function = [library() newFunctionWithName:text(name)];
  TORCH_CHECK(function, "no kernel ", name);
  return [device() newComputePipelineStateWithFunction:function error:&error];
}

id<MTLBuffer> buffer_of(const at::Tensor& tensor) {
  return (id<MTLBuffer>)const_cast<void*>(tensor.storage().data());
}

/// What a fault gets to work with: tensors, pipelines made beforehand, and torch's queue.
struct Bench {
  at::Tensor x;
  at::Tensor y;
  id<MTLComputePipelineState> scale = pipeline("scale");
  id<MTLComputePipelineState> scratch = pipeline("scratch");
  id<MTLComputePipelineState> far_write = pipeline("far_write");
  id<MTLComputePipelineState> data_race = pipeline("data_race");
  dispatch_queue_t queue = torch::mps::get_dispatch_queue();

  using Encode = std::function<void(id<MTLComputeCommandEncoder>)>;

  /// Hands an encoder to `encode`, in a block and ended after it, as it should be.
  void encoder(const Encode& encode) const {
    const Encode* call = &encode;
    dispatch_sync(queue, ^{
      id<MTLComputeCommandEncoder> encoder =
          [torch::mps::get_command_buffer() computeCommandEncoder];
      (*call)(encoder);
      [encoder endEncoding];
    });
  }

  void bind(id<MTLComputeCommandEncoder> encoder) const {
    [encoder setComputePipelineState:scale];
    [encoder setBuffer:buffer_of(x) offset:0 atIndex:0];
    [encoder setBuffer:buffer_of(y) offset:0 atIndex:1];
    [encoder setBytes:&kParams length:sizeof(kParams) atIndex:2];
  }

  static void launch(id<MTLComputeCommandEncoder> encoder, NSUInteger threads = kCount,
                     NSUInteger group = kCount) {
    [encoder dispatchThreads:MTLSizeMake(threads, 1, 1)
        threadsPerThreadgroup:MTLSizeMake(group, 1, 1)];
  }

  /// Binds everything rightly, then lets `spoil` change something, then launches.
  void spoiled(const Encode& spoil) const {
    encoder([&](id<MTLComputeCommandEncoder> encoder) {
      bind(encoder);
      spoil(encoder);
      launch(encoder);
    });
  }

  /// Runs `work` in a block of torch's queue.
  void block(const std::function<void()>& work) const {
    const std::function<void()>* call = &work;
    dispatch_sync(queue, ^{
      (*call)();
    });
  }
};

/// A command buffer of a queue of our own, where torch has no say.
id<MTLCommandBuffer> own_command_buffer() {
  static id<MTLCommandQueue> queue = [device() newCommandQueue];
  return [queue commandBuffer];
}

using Encoder = id<MTLComputeCommandEncoder>;
using Fault = std::function<void(const Bench&)>;

// clang-format off
const std::map<std::string, Fault>& faults() {
  static const std::map<std::string, Fault> faults = {
      {"none", [](const Bench& b) { b.spoiled([](Encoder) {}); }},

      // Arguments.
      {"set_bytes_too_long", [](const Bench& b) {
         b.spoiled([](Encoder e) {
           static const char bytes[4100] = {};
           [e setBytes:bytes length:sizeof(bytes) atIndex:2];
         });
       }},
      {"set_bytes_empty", [](const Bench& b) {
         b.spoiled([](Encoder e) { [e setBytes:&kParams length:0 atIndex:2]; });
       }},
      {"set_bytes_null", [](const Bench& b) {
         b.spoiled([](Encoder e) { [e setBytes:nullptr length:8 atIndex:2]; });
       }},
      {"set_bytes_wrong_size", [](const Bench& b) {
         b.spoiled([](Encoder e) { [e setBytes:&kParams length:4 atIndex:2]; });
       }},
      {"set_bytes_written_to", [](const Bench& b) {
         b.spoiled([](Encoder e) { [e setBytes:&kParams length:8 atIndex:1]; });
       }},
      {"set_buffer_data_ptr", [](const Bench& b) {
         b.spoiled([&](Encoder e) {
           char* inside = (char*)buffer_of(b.x) + 16;
           [e setBuffer:(id<MTLBuffer>)(void*)inside offset:0 atIndex:0];
         });
       }},
      {"set_buffer_freed", [](const Bench& b) {
         id<MTLBuffer> freed = [device() newBufferWithLength:64 options:0];
         [freed release];
         b.spoiled([&](Encoder e) { [e setBuffer:freed offset:0 atIndex:0]; });
       }},
      {"set_buffer_index", [](const Bench& b) {
         b.spoiled([&](Encoder e) { [e setBuffer:buffer_of(b.x) offset:0 atIndex:31]; });
       }},
      {"offset_past_end", [](const Bench& b) {
         b.spoiled([&](Encoder e) { [e setBuffer:buffer_of(b.x) offset:1 << 20 atIndex:0]; });
       }},
      {"offset_misaligned", [](const Bench& b) {
         b.spoiled([&](Encoder e) { [e setBuffer:buffer_of(b.x) offset:2 atIndex:0]; });
       }},
      {"constant_offset_misaligned", [](const Bench& b) {
         b.spoiled([&](Encoder e) { [e setBuffer:buffer_of(b.x) offset:6 atIndex:2]; });
       }},
      {"buffer_shorter_than_struct", [](const Bench& b) {
         b.spoiled([&](Encoder e) {
           [e setBuffer:buffer_of(b.x) offset:kCount * 4 - 4 atIndex:2];
         });
       }},
      {"missing_binding", [](const Bench& b) {
         b.spoiled([](Encoder e) { [e setBuffer:nil offset:0 atIndex:1]; });
       }},
      {"missing_threadgroup_memory", [](const Bench& b) {
         b.spoiled([&](Encoder e) { [e setComputePipelineState:b.scratch]; });
       }},
      {"threadgroup_memory_not_16", [](const Bench& b) {
         b.spoiled([](Encoder e) { [e setThreadgroupMemoryLength:100 atIndex:0]; });
       }},
      {"threadgroup_memory_too_large", [](const Bench& b) {
         b.spoiled([&](Encoder e) {
           [e setComputePipelineState:b.scratch];
           [e setThreadgroupMemoryLength:40960 atIndex:0];
         });
       }},

      // Dispatches.
      {"no_pipeline", [](const Bench& b) { b.encoder([](Encoder e) { Bench::launch(e); }); }},
      {"nil_pipeline", [](const Bench& b) {
         b.spoiled([](Encoder e) { [e setComputePipelineState:nil]; });
       }},
      {"too_many_threads", [](const Bench& b) {
         b.spoiled([](Encoder e) { Bench::launch(e, 2048, 2048); });
       }},
      {"empty_grid", [](const Bench& b) {
         b.spoiled([](Encoder e) { Bench::launch(e, 0); });
       }},
      {"empty_threadgroup", [](const Bench& b) {
         b.spoiled([](Encoder e) { Bench::launch(e, 8, 0); });
       }},

      // Encoders and command buffers.
      {"second_encoder", [](const Bench& b) {
         b.block([] {
           id<MTLCommandBuffer> buffer = torch::mps::get_command_buffer();
           [buffer computeCommandEncoder];
           [buffer computeCommandEncoder];
         });
       }},
      {"encoder_not_ended", [](const Bench& b) {
         b.block([] { [torch::mps::get_command_buffer() computeCommandEncoder]; });
         torch::mps::synchronize();
       }},
      {"use_after_end", [](const Bench& b) {
         b.encoder([&](Encoder e) {
           [e endEncoding];
           b.bind(e);
         });
       }},
      {"end_twice", [](const Bench& b) { b.encoder([](Encoder e) { [e endEncoding]; }); }},
      {"commit_with_open_encoder", [](const Bench& b) {
         b.encoder([](Encoder) { torch::mps::commit(); });
       }},
      {"commit_of_torchs_buffer", [](const Bench& b) {
         b.block([] { [torch::mps::get_command_buffer() commit]; });
       }},
      {"commit_twice", [](const Bench&) {
         id<MTLCommandBuffer> buffer = own_command_buffer();
         [buffer commit];
         [buffer commit];
       }},
      {"encoder_after_commit", [](const Bench&) {
         id<MTLCommandBuffer> buffer = own_command_buffer();
         [buffer commit];
         [buffer computeCommandEncoder];
       }},
      {"wait_before_commit", [](const Bench&) { [own_command_buffer() waitUntilCompleted]; }},
      {"kept_command_buffer", [](const Bench& b) {
         id<MTLCommandBuffer> kept = nil;
         b.block([&] { kept = [torch::mps::get_command_buffer() retain]; });
         b.spoiled([](Encoder) {});
         torch::mps::synchronize();
         b.block([&] { [kept computeCommandEncoder]; });
       }},
      {"encoder_beside_torchs_own", [](const Bench& b) {
         id<MTLCommandBuffer> kept = nil;
         b.block([&] { kept = torch::mps::get_command_buffer(); });
         at::Tensor again = at::zeros_like(b.x);  // torch opens an encoder of its own
         b.block([&] { [kept computeCommandEncoder]; });
       }},

      // The serial queue.
      {"command_buffer_off_queue", [](const Bench&) { torch::mps::get_command_buffer(); }},
      {"encoder_off_queue", [](const Bench& b) {
         id<MTLCommandBuffer> buffer = nil;
         b.block([&] { buffer = torch::mps::get_command_buffer(); });
         [buffer computeCommandEncoder];
       }},
      {"encode_off_queue", [](const Bench& b) {
         Encoder encoder = nil;
         b.block([&] { encoder = [torch::mps::get_command_buffer() computeCommandEncoder]; });
         b.bind(encoder);
       }},
      {"nested_dispatch_sync", [](const Bench& b) {
         b.block([&] { b.block([] {}); });
       }},
      {"exception_in_block", [](const Bench& b) {
         b.block([] { TORCH_CHECK(false, "thrown inside"); });
       }},
      {"tensor_in_block", [](const Bench& b) {
         b.block([&] { at::empty({4}, b.x.options()); });
       }},
      {"library_in_block", [](const Bench& b) {
         b.block([] {
           std::string error;
           compile(source(), nil, error);
         });
       }},
      {"pipeline_in_block", [](const Bench& b) { b.block([] { pipeline("scale"); }); }},
      {"synchronize_in_block", [](const Bench& b) { b.block([] { torch::mps::synchronize(); }); }},
      {"copy_in_block", [](const Bench& b) { b.block([&] { b.x.cpu(); }); }},

      // Objects.
      {"message_to_deallocated", [](const Bench&) {
         MTLCompileOptions* options = [MTLCompileOptions new];
         [options release];
         [options languageVersion];
       }},
      {"unknown_selector", [](const Bench&) { [(id<NoSuchProtocol>)device() noSuchMethod]; }},
      {"written_beside_buffer", [](const Bench&) {
         id<MTLBuffer> buffer = [device() newBufferWithLength:60 options:0];
         static_cast<char*>([buffer contents])[60] = 1;
         [buffer release];
       }},

      // Faults of kernels: reported when somebody waits.
      {"grid_too_large", [](const Bench& b) {
         b.spoiled([](Encoder e) { Bench::launch(e, 4096, 256); });
       }},
      {"far_write", [](const Bench& b) {
         b.encoder([&](Encoder e) {
           [e setComputePipelineState:b.far_write];
           [e setBuffer:buffer_of(b.y) offset:0 atIndex:0];
           Bench::launch(e);
         });
       }},
      {"data_race", [](const Bench& b) {  // seen in the race build only
         b.encoder([&](Encoder e) {
           [e setComputePipelineState:b.data_race];
           [e setBuffer:buffer_of(b.y) offset:0 atIndex:0];
           Bench::launch(e, 64, 64);
         });
       }},
  };
  return faults;
}
// clang-format on

std::vector<std::string> names() {
  std::vector<std::string> names;
  for (const auto& [name, fault] : faults()) names.push_back(name);
  return names;
}

at::Tensor run(const at::Tensor& x, const std::string& fault) {
  at::Tensor y = at::zeros_like(x);
  std::string failure;
  @autoreleasepool {
    try {
      faults().at(fault)(Bench{x, y});
    } catch (const std::exception& error) {
      failure = error.what();
    }
  }
  TORCH_CHECK(failure.empty(), failure);
  return y;
}

/// An autorelease outside of any pool.
void without_pool() { [[MTLCompileOptions new] autorelease]; }

/// What the device reports as NSError for a library, by name or source, and a specialisation of one
/// of its functions; empty for none.
std::string error_of(const std::string& library, int64_t language_minor,
                     const std::string& function, const std::string& constant,
                     const std::string& type) {
  std::string message;
  @autoreleasepool {
    MTLCompileOptions* options = [[MTLCompileOptions new] autorelease];
    options.languageVersion = (3 << 16) + language_minor;
    id<MTLLibrary> compiled = compile(source(library), options, message);
    NSError* error = nil;
    if (compiled && !function.empty()) {
      MTLFunctionConstantValues* values = [[MTLFunctionConstantValues new] autorelease];
      const uint32_t one = 1;
      if (!constant.empty()) {
        [values setConstantValue:&one
                            type:type == "bool" ? MTLDataTypeBool : MTLDataTypeFloat
                        withName:text(constant)];
      }
      id<MTLFunction> found = [compiled newFunctionWithName:text(function)
                                             constantValues:values
                                                      error:&error];
      if (found) [device() newComputePipelineStateWithFunction:found error:&error];
      if (error) message = [[error localizedDescription] UTF8String];
    }
  }
  return message;
}

/// First element of y as the host sees it right after encoding, nobody having waited.
double peek(const at::Tensor& x) {
  at::Tensor y = at::empty(x.sizes(), x.options());
  @autoreleasepool {
    Bench{x, y}.spoiled([](Encoder) {});
  }
  torch::mps::commit();
  return *static_cast<const float*>([buffer_of(y) contents]);
}

TORCH_LIBRARY(kvq_misuse, m) {
  m.def("run(Tensor x, str fault) -> Tensor");
  m.def("peek(Tensor x) -> float");
  m.def("names() -> str[]", names);
  m.def("without_pool() -> ()", without_pool);
  m.def("error_of(str library, int language_minor, str function, str constant, str type) -> str",
        error_of);
}

TORCH_LIBRARY_IMPL(kvq_misuse, MPS, m) {
  m.impl("run", run);
  m.impl("peek", peek);
}

}  // namespace
