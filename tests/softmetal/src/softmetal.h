// What the software Metal device offers to the software mps backend and to Python.
#pragma once

#import <Metal/Metal.h>

#include <atomic>
#include <cstdint>
#include <string>

#define SOFTMETAL_API __attribute__((visibility("default")))

namespace softmetal {

/// Host code did what Metal forbids: says so and aborts, as Metal's validation layer does.
[[noreturn]] SOFTMETAL_API void fatal(const char* format, ...)
    __attribute__((format(printf, 1, 2)));

/// What happened since the start or the last reset; COUNTERS in __init__.py names these, in order.
struct Counters {
  std::atomic<uint64_t> libraries{0};         ///< newLibrary... calls that gave a library
  std::atomic<uint64_t> pipelines{0};         ///< pipeline states made
  std::atomic<uint64_t> command_buffers{0};   ///< command buffers committed
  std::atomic<uint64_t> encoders{0};          ///< compute encoders made, torch's own not counted
  std::atomic<uint64_t> dispatches{0};        ///< kernel launches encoded
  std::atomic<uint64_t> explicit_commits{0};  ///< calls of torch::mps::commit()
  std::atomic<uint64_t> waits{0};             ///< times the host waited for the device
  std::atomic<uint64_t> fallbacks{0};         ///< aten ops run by the CPU
  std::atomic<uint64_t> buffer_bytes{0};      ///< bytes of living buffers (never reset)
  std::atomic<uint64_t> peak_buffer_bytes{0};
  std::atomic<uint64_t> live_objects{0};  ///< living Objective-C objects (never reset)
};
SOFTMETAL_API Counters& counters();

/// True where the calling thread is inside a block of this queue, or of any queue for nullptr.
SOFTMETAL_API bool on_queue(dispatch_queue_t queue);

/// Ties a command buffer to a stream: encoding is then allowed on `queue` only, and the host code
/// may not commit it by itself.
SOFTMETAL_API void adopt_command_buffer(id<MTLCommandBuffer> buffer, dispatch_queue_t queue);
/// Commits an adopted command buffer.
SOFTMETAL_API void commit_adopted(id<MTLCommandBuffer> buffer);
SOFTMETAL_API bool has_commands(id<MTLCommandBuffer> buffer);

/// Message of the first kernel fault since the last call, or an empty string.
SOFTMETAL_API std::string take_fault();

}  // namespace softmetal
