// Serial queues of libdispatch. dispatch_sync runs the block on the calling thread.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <string>
#include <vector>

#include "data.h"
#include "softmetal.h"

struct softmetal_queue {
  std::string label;
  std::mutex mutex;
};

namespace {

/// Queues whose blocks this thread is inside of, innermost last.
thread_local std::vector<dispatch_queue_t> entered;

/// libdispatch is no place for C++ exceptions: one that leaves a block ends the process.
void call_out(void* context, dispatch_function_t work) noexcept {
  try {
    work(context);
  } catch (const std::exception& error) {
    softmetal::fatal("a C++ exception left a dispatched block: %s", error.what());
  } catch (...) {
    softmetal::fatal("a C++ exception left a dispatched block");
  }
}

}  // namespace

namespace softmetal {

void fatal(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fputs("[softmetal] failed assertion: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  std::fflush(stderr);
  va_end(arguments);
  std::abort();
}

bool on_queue(dispatch_queue_t queue) {
  for (dispatch_queue_t inside : entered) {
    if (!queue || inside == queue) return true;
  }
  return false;
}

}  // namespace softmetal

extern "C" {

SOFTMETAL_API dispatch_queue_t dispatch_queue_create(const char* label, dispatch_queue_attr_t) {
  return new softmetal_queue{label ? label : "", {}};
}

SOFTMETAL_API void dispatch_sync_f(dispatch_queue_t queue, void* context,
                                   dispatch_function_t work) {
  if (!queue) softmetal::fatal("dispatch_sync on a null queue");
  if (softmetal::on_queue(queue)) {
    softmetal::fatal("dispatch_sync on queue '%s', whose block this thread is already in: deadlock",
                     queue->label.c_str());
  }
  std::lock_guard<std::mutex> lock(queue->mutex);
  entered.push_back(queue);
  call_out(context, work);
  entered.pop_back();
}

SOFTMETAL_API void dispatch_sync(dispatch_queue_t queue, dispatch_block_t block) {
  dispatch_sync_f(queue, (void*)block, [](void* context) { ((dispatch_block_t)context)(); });
}

SOFTMETAL_API dispatch_data_t dispatch_data_create(const void* buffer, size_t size,
                                                   dispatch_queue_t, dispatch_block_t) {
  return new softmetal_data{std::string(static_cast<const char*>(buffer), size)};
}

SOFTMETAL_API void dispatch_release(dispatch_data_t object) { delete object; }

}  // extern "C"
