// The software mps backend of torch: allocator, stream, device guard, hooks.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <chrono>
#include <cstring>
#include <map>
#include <mutex>

#include "mps_stream.h"
#include "softmetal.h"

namespace softmetal {
namespace {

constexpr size_t kRecommendedMaxMemory = size_t(8) << 30;
/// Bytes that setMemoryFraction allows.
std::atomic<size_t> memory_limit{SIZE_MAX};

id<MTLDevice> device() {
  static id<MTLDevice> device = MTLCreateSystemDefaultDevice();
  return device;
}

class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const size_t living = counters().buffer_bytes;
    TORCH_CHECK_WITH(OutOfMemoryError, living + bytes <= memory_limit,
                     "MPS backend out of memory (MPS allocated: ", living,
                     " bytes, max allowed: ", memory_limit.load(), " bytes). Tried to allocate ",
                     bytes, " bytes");
    id<MTLBuffer> buffer = nil;
    if (bytes > 0) {
      buffer = [device() newBufferWithLength:bytes options:MTLResourceStorageModeShared];
      TORCH_CHECK(buffer, "Invalid buffer size: ", bytes, " bytes");
    }
    return {(void*)buffer, (void*)buffer, &release, c10::Device(c10::kMPS, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    Stream::instance().synchronize();
    std::memcpy([(id<MTLBuffer>)to contents], [(id<MTLBuffer>)const_cast<void*>(from) contents],
                bytes);
  }

 private:
  static void release(void* buffer) { [(id<MTLBuffer>)buffer release]; }
};

Allocator mps_allocator;

}  // namespace

c10::Allocator* allocator() { return &mps_allocator; }

Stream& Stream::instance() {
  static auto* stream = new Stream;
  return *stream;
}

Stream::Stream()
    : queue_(dispatch_queue_create("metal gpu stream", DISPATCH_QUEUE_SERIAL)),
      command_queue_([device() newCommandQueue]) {}

id<MTLCommandBuffer> Stream::current() {
  if (!current_) {
    @autoreleasepool {
      current_ = [[command_queue_ commandBuffer] retain];
    }
    adopt_command_buffer(current_, queue_);
  }
  return current_;
}

id<MTLCommandBuffer> Stream::command_buffer() {
  if (!on_queue(queue_)) {
    fatal("torch::mps::get_command_buffer() outside of dispatch_sync on the stream's queue: "
          "another thread may commit the buffer before it is used");
  }
  end_torch_encoder();
  if (current_ && has_commands(current_)) commit_current();
  return current();
}

void Stream::leave_encoder_open() {
  dispatch_sync(queue_, ^{
    if (torch_encoder_) return;
    @autoreleasepool {
      torch_encoder_ = [[current() computeCommandEncoder] retain];
    }
    --counters().encoders;
  });
}

void Stream::end_torch_encoder() {
  if (!torch_encoder_) return;
  [torch_encoder_ endEncoding];
  [torch_encoder_ release];
  torch_encoder_ = nil;
}

void Stream::commit_current() {
  end_torch_encoder();
  if (!current_) return;
  commit_adopted(current_);
  [last_ release];
  last_ = current_;
  current_ = nil;
}

void Stream::commit() {
  if (on_queue(queue_)) return commit_current();
  dispatch_sync(queue_, ^{
    commit_current();
  });
}

void Stream::synchronize() {
  if (on_queue(queue_)) {
    fatal("the host waits for the device inside a dispatched block of the stream's queue "
          "(synchronize, a copy to the host or an aten op)");
  }
  __block id<MTLCommandBuffer> last = nil;
  dispatch_sync(queue_, ^{
    commit_current();
    last = [last_ retain];  // stays last_: another thread may have to wait for it, too
  });
  [last waitUntilCompleted];
  [last release];
  const std::string fault = take_fault();
  TORCH_CHECK(fault.empty(), "[softmetal] ", fault);
}

at::Tensor host_alias(const at::Tensor& tensor) {
  id<MTLBuffer> buffer = (id<MTLBuffer>)const_cast<void*>(tensor.storage().data());
  char* bytes = buffer ? static_cast<char*>([buffer contents]) : nullptr;
  if (bytes) bytes += tensor.storage_offset() * tensor.element_size();
  at::Tensor alias =
      at::from_blob(bytes, tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
  if (tensor.is_conj()) alias._set_conj(true);
  if (tensor.is_neg()) alias._set_neg(true);
  return alias;
}

namespace {

REGISTER_ALLOCATOR(c10::DeviceType::MPS, &mps_allocator)

/// Recording waits for the device, so every recorded event has happened.
class Events {
 public:
  using Clock = std::chrono::steady_clock;

  uint32_t acquire() {
    std::lock_guard<std::mutex> lock(mutex_);
    times_[++last_] = {};
    return last_;
  }
  void release(uint32_t event) {
    std::lock_guard<std::mutex> lock(mutex_);
    times_.erase(event);
  }
  void record(uint32_t event) {
    Stream::instance().synchronize();
    std::lock_guard<std::mutex> lock(mutex_);
    times_.at(event) = Clock::now();
  }
  double milliseconds(uint32_t start, uint32_t end) {
    std::lock_guard<std::mutex> lock(mutex_);
    return std::chrono::duration<double, std::milli>(times_.at(end) - times_.at(start)).count();
  }

 private:
  std::mutex mutex_;
  std::map<uint32_t, Clock::time_point> times_;
  uint32_t last_ = 0;
};

Events& events() {
  static auto* events = new Events;
  return *events;
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kMPS; }
  c10::Device exchangeDevice(c10::Device) const override { return {c10::kMPS, 0}; }
  c10::Device getDevice() const override { return {c10::kMPS, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void synchronizeStream(const c10::Stream&) const override { Stream::instance().synchronize(); }
  void synchronizeDevice(c10::DeviceIndex) const override { Stream::instance().synchronize(); }

  // torch.Event: the handle is an id of Events.
  void record(void** event, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {
    if (!*event) *event = handle(events().acquire());
    events().record(id_of(*event));
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override {
    if (event) events().release(id_of(event));
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  double elapsedTime(void* start, void* end, c10::DeviceIndex) const override {
    return events().milliseconds(id_of(start), id_of(end));
  }

 private:
  static void* handle(uint32_t id) { return reinterpret_cast<void*>(uintptr_t{id}); }
  static uint32_t id_of(void* event) {
    return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(event));
  }
  static c10::Stream stream() {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(c10::kMPS, 0));
  }
};

C10_REGISTER_GUARD_IMPL(MPS, Guard)

/// The registry finds the hooks by this very class name.
struct MPSHooks final : at::MPSHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasMPS() const override { return true; }
  bool isOnMacOSorNewer(unsigned major, unsigned) const override { return major <= 14; }

  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<at::CPUGeneratorImpl>();
  }
  c10::Allocator* getMPSDeviceAllocator() const override { return allocator(); }

  void deviceSynchronize() const override { Stream::instance().synchronize(); }
  void commitStream() const override {
    ++counters().explicit_commits;
    Stream::instance().commit();
  }
  void* getCommandBuffer() const override { return (void*)Stream::instance().command_buffer(); }
  void* getDispatchQueue() const override { return (void*)Stream::instance().queue(); }

  void emptyCache() const override {}
  size_t getCurrentAllocatedMemory() const override { return counters().buffer_bytes; }
  size_t getDriverAllocatedMemory() const override { return counters().buffer_bytes; }
  size_t getRecommendedMaxMemory() const override { return kRecommendedMaxMemory; }
  size_t getMaxBufferLength() const override { return [device() maxBufferLength]; }
  void setMemoryFraction(double ratio) const override {
    memory_limit = ratio > 0 ? static_cast<size_t>(ratio * kRecommendedMaxMemory) : SIZE_MAX;
  }

  uint32_t acquireEvent(bool) const override { return events().acquire(); }
  void releaseEvent(uint32_t event) const override { events().release(event); }
  void recordEvent(uint32_t event) const override { events().record(event); }
  void waitForEvent(uint32_t) const override {}
  void synchronizeEvent(uint32_t) const override {}
  bool queryEvent(uint32_t) const override { return true; }
  double elapsedTimeOfEvents(uint32_t start, uint32_t end) const override {
    return events().milliseconds(start, end);
  }

  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
};

}  // namespace
}  // namespace softmetal

namespace at {
using softmetal::MPSHooks;
REGISTER_MPS_HOOKS(MPSHooks)
}  // namespace at

namespace softmetal {
namespace {

// at::detail::getMPSHooks() keeps the first object it made. Where somebody asked before this
// library was loaded that is the interface itself, whose methods all refuse: it gets our vtable
// instead.
[[maybe_unused]] const bool hooks_are_ours = [] {
  static_assert(sizeof(MPSHooks) == sizeof(at::MPSHooksInterface), "both must have no members");
  auto& cached = const_cast<at::MPSHooksInterface&>(at::detail::getMPSHooks());
  if (!cached.hasMPS()) {
    static MPSHooks ours;
    std::memcpy(static_cast<void*>(&cached), static_cast<const void*>(&ours), sizeof(void*));
  }
  return true;
}();

}  // namespace
}  // namespace softmetal
