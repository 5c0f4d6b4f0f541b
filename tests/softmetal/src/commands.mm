#include "commands.h"

#include <array>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "config.h"
#include "foundation.h"
#include "resources.h"
#include "softmetal.h"
#include "timeline.h"

using softmetal::counters;
using softmetal::fatal;

namespace {

constexpr NSUInteger kMaxSetBytes = 4096;

/// An argument-table entry. The buffer is kept alive by the command buffer.
struct Argument {
  enum class Kind { kUnset, kBuffer, kBytes } kind = Kind::kUnset;
  SoftBuffer* buffer = nil;
  NSUInteger offset = 0;
  std::shared_ptr<const std::vector<char>> bytes;
};

using ArgumentTable = std::array<Argument, EMU_MAX_BUFFERS>;
using ThreadgroupMemory = std::array<NSUInteger, EMU_MAX_BUFFERS>;

/// An encoded kernel launch.
struct Dispatch {
  SoftPipeline* pipeline;
  ArgumentTable arguments;
  ThreadgroupMemory threadgroup_memory;
  MTLSize grid;
  MTLSize threads_per_threadgroup;
  bool grid_in_threads;

  /// Returns the emulator's message about a fault, or an empty string.
  std::string run() const;
};

struct CommandBufferState {
  std::vector<Dispatch> dispatches;
  std::vector<id> retained;
  dispatch_queue_t owner = nullptr;  ///< of an adopted buffer
  bool is_encoding = false;
  bool has_encoders = false;

  std::mutex mutex;
  std::condition_variable done;
  MTLCommandBufferStatus status = MTLCommandBufferStatusNotEnqueued;
  std::string fault;
};

/// The first fault nobody has been told of.
struct FaultBox {
  std::mutex mutex;
  std::string message;
};

FaultBox& fault_box() {
  static auto* box = new FaultBox;
  return *box;
}

std::string Dispatch::run() const {
  const softmetal::Specialization& function = *pipeline->specialization;
  std::vector<emu_buffer> buffers;
  for (uint32_t i = 0; i < arguments.size(); ++i) {
    const Argument& argument = arguments[i];
    if (argument.kind == Argument::Kind::kBuffer) {
      buffers.push_back({i, 0, argument.buffer->bytes + argument.offset,
                         argument.buffer->length - argument.offset});
    } else if (argument.kind == Argument::Kind::kBytes) {
      buffers.push_back(
          {i, EMU_BUFFER_COPY, const_cast<char*>(argument.bytes->data()), argument.bytes->size()});
    }
  }
  std::vector<emu_threadgroup_memory> memory;
  for (uint32_t i = 0; i < threadgroup_memory.size(); ++i) {
    if (threadgroup_memory[i] > 0) {
      memory.push_back({i, static_cast<uint32_t>(threadgroup_memory[i])});
    }
  }
  const std::vector<emu_constant_value> constants = function.constant_values();

  emu_launch launch{};
  launch.kernel = function.kernel;
  launch.flags = grid_in_threads ? EMU_LAUNCH_GRID_IN_THREADS : 0;
  launch.seed = softmetal::config().seed;
  const NSUInteger extents[] = {grid.width, grid.height, grid.depth};
  const NSUInteger group[] = {threads_per_threadgroup.width, threads_per_threadgroup.height,
                              threads_per_threadgroup.depth};
  for (int axis = 0; axis < 3; ++axis) {
    launch.grid[axis] = static_cast<uint32_t>(extents[axis]);
    launch.threads_per_threadgroup[axis] = static_cast<uint32_t>(group[axis]);
  }
  launch.buffers = buffers.data();
  launch.n_buffers = buffers.size();
  launch.threadgroup_memory = memory.data();
  launch.n_threadgroup_memory = memory.size();
  launch.constants = constants.data();
  launch.n_constants = constants.size();

  std::string message(2048, '\0');
  const emu_status status = function.library->api().launch(&launch, message.data(), message.size());
  if (status != EMU_OK)
    return "kernel " + std::string(function.kernel->name) + ": " + message.c_str();
  for (const Argument& argument : arguments) {
    if (argument.kind == Argument::Kind::kBuffer && ![argument.buffer isIntact]) {
      return "kernel " + std::string(function.kernel->name) + ": wrote beside a buffer of " +
             std::to_string(argument.buffer->length) + " bytes";
    }
  }
  return "";
}

}  // namespace

@interface SoftCommandBuffer : NSObject <MTLCommandBuffer> {
 @public
  CommandBufferState* state;
}
- (void)commitAdopted;
- (void)keep:(id)object;
@end

@interface SoftEncoder : NSObject <MTLComputeCommandEncoder> {
 @public
  SoftCommandBuffer* commandBuffer;
  SoftPipeline* pipeline;
  ArgumentTable* arguments;
  ThreadgroupMemory* threadgroupMemory;
  BOOL hasEnded;
}
@end

namespace {

/// An adopted command buffer is encoded on its stream's queue and nowhere else.
void check_queue(const CommandBufferState& state, const char* what) {
  if (state.owner && !softmetal::on_queue(state.owner)) {
    fatal("%s outside of dispatch_sync on the stream's queue: another thread may be encoding",
          what);
  }
}

void check_open(const SoftEncoder* encoder, const char* what) {
  if (encoder->hasEnded) fatal("%s after endEncoding", what);
  check_queue(*encoder->commandBuffer->state, what);
}

void check_index(NSUInteger index, const char* what) {
  if (index >= EMU_MAX_BUFFERS)
    fatal("%s: index %lu must be in 0..%d", what, index, EMU_MAX_BUFFERS - 1);
}

void check_buffer_argument(const emu_kernel& kernel, const emu_param& param,
                           const Argument& argument) {
  const NSUInteger element = param.elem_size;
  switch (argument.kind) {
    case Argument::Kind::kUnset:
      if (param.is_optional) return;
      fatal("kernel %s: missing buffer binding at index %u for argument %s", kernel.name,
            param.index, param.name);
    case Argument::Kind::kBytes: {
      const NSUInteger length = argument.bytes->size();
      const bool fits = param.is_reference ? length == element
                                           : element == 0 || (length > 0 && length % element == 0);
      if (!fits) {
        fatal("kernel %s: argument %s at index %u: setBytes gave %lu bytes, its type has %lu",
              kernel.name, param.name, param.index, length, element);
      }
      if (!param.is_read_only) {
        fatal("kernel %s: argument %s at index %u is written to, but setBytes bound it",
              kernel.name, param.name, param.index);
      }
      return;
    }
    case Argument::Kind::kBuffer: {
      // Apple's GPUs want four bytes for the constant address space, else the type's alignment.
      NSUInteger alignment = param.elem_align;
      if (param.is_constant && alignment < 4) alignment = 4;
      if (argument.offset % alignment != 0) {
        fatal("kernel %s: argument %s at index %u: offset %lu is not a multiple of %lu",
              kernel.name, param.name, param.index, argument.offset, alignment);
      }
      if (argument.buffer->length - argument.offset < element) {
        fatal("kernel %s: argument %s at index %u: %lu bytes follow offset %lu, its type has %lu",
              kernel.name, param.name, param.index, argument.buffer->length - argument.offset,
              argument.offset, element);
      }
      return;
    }
  }
}

void check_extent(const MTLSize& size, const char* what) {
  for (NSUInteger extent : {size.width, size.height, size.depth}) {
    if (extent == 0 || extent > UINT32_MAX) {
      fatal("%s (%lu, %lu, %lu): each must be in 1..2^32-1", what, size.width, size.height,
            size.depth);
    }
  }
}

void check_dispatch(const Dispatch& dispatch) {
  const emu_kernel& kernel = *dispatch.pipeline->specialization->kernel;
  check_extent(dispatch.grid, "grid");
  check_extent(dispatch.threads_per_threadgroup, "threadsPerThreadgroup");
  const NSUInteger threads = dispatch.threads_per_threadgroup.width *
                             dispatch.threads_per_threadgroup.height *
                             dispatch.threads_per_threadgroup.depth;
  const NSUInteger most = [dispatch.pipeline maxTotalThreadsPerThreadgroup];
  if (threads > most) {
    fatal("kernel %s: %lu threads per threadgroup, its pipeline admits %lu", kernel.name, threads,
          most);
  }
  NSUInteger memory = [dispatch.pipeline staticThreadgroupMemoryLength];
  for (NSUInteger bytes : dispatch.threadgroup_memory) memory += bytes;
  if (memory > EMU_MAX_THREADGROUP_BYTES) {
    fatal("kernel %s: %lu bytes of threadgroup memory, the device has %d", kernel.name, memory,
          EMU_MAX_THREADGROUP_BYTES);
  }
  for (uint32_t i = 0; i < kernel.n_params; ++i) {
    const emu_param& param = kernel.params[i];
    if (param.kind == EMU_PARAM_BUFFER) {
      check_buffer_argument(kernel, param, dispatch.arguments[param.index]);
    } else if (dispatch.threadgroup_memory[param.index] <
               std::max<NSUInteger>(param.elem_size, 1)) {
      fatal("kernel %s: threadgroup memory at index %u for argument %s was not set", kernel.name,
            param.index, param.name);
    }
  }
}

}  // namespace

@implementation SoftEncoder
- (void)setComputePipelineState:(id<MTLComputePipelineState>)newState {
  check_open(self, "setComputePipelineState");
  if (!newState) fatal("setComputePipelineState: nil");
  pipeline = (SoftPipeline*)newState;
  [commandBuffer keep:pipeline];
}
- (void)setBytes:(const void*)bytes length:(NSUInteger)length atIndex:(NSUInteger)index {
  check_open(self, "setBytes");
  check_index(index, "setBytes");
  if (!bytes) fatal("setBytes at index %lu: NULL", index);
  if (length == 0 || length > kMaxSetBytes) {
    fatal("setBytes at index %lu: length %lu must be in 1..%lu", index, length, kMaxSetBytes);
  }
  const char* begin = static_cast<const char*>(bytes);
  (*arguments)[index] = {Argument::Kind::kBytes, nil, 0,
                         std::make_shared<const std::vector<char>>(begin, begin + length)};
}
- (void)setBuffer:(id<MTLBuffer>)buffer offset:(NSUInteger)offset atIndex:(NSUInteger)index {
  check_open(self, "setBuffer");
  check_index(index, "setBuffer");
  if (!buffer) {
    (*arguments)[index] = {};
    return;
  }
  SoftBuffer* checked = [SoftBuffer checked:buffer atIndex:index];
  if (offset >= checked->length) {
    fatal("setBuffer at index %lu: offset %lu is past the buffer's %lu bytes", index, offset,
          checked->length);
  }
  [commandBuffer keep:checked];
  (*arguments)[index] = {Argument::Kind::kBuffer, checked, offset, nullptr};
}
- (void)setThreadgroupMemoryLength:(NSUInteger)length atIndex:(NSUInteger)index {
  check_open(self, "setThreadgroupMemoryLength");
  check_index(index, "setThreadgroupMemoryLength");
  if (length % 16 != 0) {
    fatal("setThreadgroupMemoryLength at index %lu: %lu is not a multiple of 16", index, length);
  }
  (*threadgroupMemory)[index] = length;
}
- (void)dispatch:(MTLSize)grid
    threadsPerThreadgroup:(MTLSize)threads
            gridInThreads:(BOOL)gridInThreads {
  check_open(self, "dispatch");
  if (!pipeline) fatal("dispatch without a pipeline state");
  Dispatch dispatch{pipeline, *arguments, *threadgroupMemory, grid, threads, bool(gridInThreads)};
  check_dispatch(dispatch);
  ++counters().dispatches;
  commandBuffer->state->dispatches.push_back(std::move(dispatch));
}
- (void)dispatchThreadgroups:(MTLSize)threadgroupsPerGrid
       threadsPerThreadgroup:(MTLSize)threadsPerThreadgroup {
  [self dispatch:threadgroupsPerGrid threadsPerThreadgroup:threadsPerThreadgroup gridInThreads:NO];
}
- (void)dispatchThreads:(MTLSize)threadsPerGrid
    threadsPerThreadgroup:(MTLSize)threadsPerThreadgroup {
  [self dispatch:threadsPerGrid threadsPerThreadgroup:threadsPerThreadgroup gridInThreads:YES];
}
- (void)endEncoding {
  check_open(self, "endEncoding");
  hasEnded = YES;
  commandBuffer->state->is_encoding = false;
}
- (void)dealloc {
  if (!hasEnded) fatal("a command encoder was released without endEncoding");
  delete arguments;
  delete threadgroupMemory;
  [commandBuffer release];
  [super dealloc];
}
@end

@implementation SoftCommandBuffer
- (instancetype)init {
  state = new CommandBufferState;
  return self;
}
- (id<MTLDevice>)device {
  return [SoftDevice shared];
}
- (MTLCommandBufferStatus)status {
  std::lock_guard<std::mutex> lock(state->mutex);
  return state->status;
}
- (NSError*)error {
  std::lock_guard<std::mutex> lock(state->mutex);
  return state->fault.empty() ? nil : softmetal::make_error(state->fault);
}
- (void)keep:(id)object {
  state->retained.push_back([object retain]);
}
- (id<MTLComputeCommandEncoder>)computeCommandEncoder {
  check_queue(*state, "computeCommandEncoder");
  if ([self status] != MTLCommandBufferStatusNotEnqueued) {
    fatal("computeCommandEncoder on a committed command buffer (kept from an earlier call?)");
  }
  if (state->is_encoding) {
    fatal("computeCommandEncoder while another encoder is open on this command buffer");
  }
  state->is_encoding = state->has_encoders = true;
  ++counters().encoders;
  SoftEncoder* encoder = [[SoftEncoder new] autorelease];
  encoder->commandBuffer = [self retain];
  encoder->arguments = new ArgumentTable;
  encoder->threadgroupMemory = new ThreadgroupMemory{};
  return encoder;
}
- (void)commit {
  if (state->owner) fatal("commit of torch's own command buffer: use torch::mps::commit()");
  [self commitAdopted];
}
- (void)commitAdopted {
  if ([self status] != MTLCommandBufferStatusNotEnqueued)
    fatal("commit of a committed command buffer");
  if (state->is_encoding) fatal("commit while an encoder is open: endEncoding is missing");
  {
    std::lock_guard<std::mutex> lock(state->mutex);
    state->status = MTLCommandBufferStatusCommitted;
  }
  ++counters().command_buffers;
  [self retain];
  softmetal::Timeline::instance().submit([self] {
    [self execute];
    [self release];
  });
}
- (void)execute {
  std::string fault;
  for (const Dispatch& dispatch : state->dispatches) {
    fault = dispatch.run();
    if (!fault.empty()) break;  // a GPU gives the rest of the command buffer up, too
  }
  if (!fault.empty()) {
    std::lock_guard<std::mutex> lock(fault_box().mutex);
    if (fault_box().message.empty()) fault_box().message = fault;
  }
  state->dispatches.clear();
  for (id object : state->retained) [object release];
  state->retained.clear();
  std::lock_guard<std::mutex> lock(state->mutex);
  state->status = fault.empty() ? MTLCommandBufferStatusCompleted : MTLCommandBufferStatusError;
  state->fault = fault;
  state->done.notify_all();
}
- (void)waitUntilCompleted {
  if ([self status] == MTLCommandBufferStatusNotEnqueued) {
    fatal("waitUntilCompleted before commit: it would never return");
  }
  ++counters().waits;
  softmetal::Timeline::instance().release();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->done.wait(lock, [self] { return state->status >= MTLCommandBufferStatusCompleted; });
}
- (void)dealloc {
  for (id object : state->retained) [object release];
  delete state;
  [super dealloc];
}
@end

@interface SoftCommandQueue : NSObject <MTLCommandQueue>
@end

@implementation SoftCommandQueue
- (id<MTLDevice>)device {
  return [SoftDevice shared];
}
- (id<MTLCommandBuffer>)commandBuffer {
  return [[SoftCommandBuffer new] autorelease];
}
@end

namespace softmetal {

id<MTLCommandQueue> new_command_queue() { return [SoftCommandQueue new]; }

void adopt_command_buffer(id<MTLCommandBuffer> buffer, dispatch_queue_t queue) {
  ((SoftCommandBuffer*)buffer)->state->owner = queue;
}

void commit_adopted(id<MTLCommandBuffer> buffer) { [(SoftCommandBuffer*)buffer commitAdopted]; }

bool has_commands(id<MTLCommandBuffer> buffer) {
  return ((SoftCommandBuffer*)buffer)->state->has_encoders;
}

std::string take_fault() {
  std::lock_guard<std::mutex> lock(fault_box().mutex);
  return std::exchange(fault_box().message, {});
}

}  // namespace softmetal
