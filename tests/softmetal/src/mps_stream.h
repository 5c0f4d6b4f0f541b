// Torch's stream on the software device, and how its tensors map to memory.
#pragma once

#import <Metal/Metal.h>

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>

namespace softmetal {

/// Torch's one stream: a command queue, its serial dispatch queue and the open command buffer.
///
/// Like torch's own it may commit between any two ops (it does so whenever it can, unless lazy mode
/// is on, so that host code cannot come to rely on the opposite), and torch leaves an encoder of
/// its own open after an op, which command_buffer() ends.
class Stream {
 public:
  static Stream& instance();

  dispatch_queue_t queue() const { return queue_; }
  /// What torch::mps::get_command_buffer() returns; only on the queue.
  id<MTLCommandBuffer> command_buffer();
  void commit();
  /// Waits for all work; throws c10::Error where a kernel faulted.
  void synchronize();
  /// Called after each aten op.
  void leave_encoder_open();

 private:
  Stream();
  id<MTLCommandBuffer> current();
  void end_torch_encoder();
  void commit_current();

  dispatch_queue_t queue_;
  id<MTLCommandQueue> command_queue_;
  id<MTLCommandBuffer> current_ = nil;
  id<MTLCommandBuffer> last_ = nil;  ///< most recently committed
  id<MTLComputeCommandEncoder> torch_encoder_ = nil;
};

/// Allocates MTLBuffers; like torch's it puts the id where other devices put the address.
c10::Allocator* allocator();

/// A CPU tensor over the bytes of an mps tensor. The caller has synchronised.
at::Tensor host_alias(const at::Tensor& tensor);

}  // namespace softmetal
