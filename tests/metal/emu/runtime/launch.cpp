// The C ABI: checks a request, places its memory, runs it.
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <map>
#include <mutex>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "runtime.h"

namespace emu {

namespace {

#if defined(EMU_RACE)
constexpr const char* kMode = "race";
#elif defined(EMU_ASAN)
constexpr const char* kMode = "asan";
#elif defined(EMU_FASTMATH)
constexpr const char* kMode = "fastmath";
#else
constexpr const char* kMode = "fast";
#endif

struct Variable {
  emu_threadgroup_variable* variable;
  Guarded block;
};
struct Span {  // bound buffers that overlap are one region
  uintptr_t low, high;
  bool read_only, copy;
  uint granule;
  std::string name;
  Guarded block;
};

std::mutex launch_lock;
std::map<const emu_kernel*, uint> static_bytes;
const emu_launch* request;
std::vector<Span> spans;
std::vector<Variable> variables;
std::vector<Guarded> dynamic_memory;
uint threadgroup_bytes;
uint next_index;
ulong launches = 0;

// Single-precision denormals are flushed by fast-math code on a GPU.
class FlushDenormals {
 public:
#if defined(EMU_FASTMATH) && defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  uint saved_;
#elif defined(EMU_FASTMATH) && defined(__aarch64__)
  FlushDenormals() : saved_(__builtin_aarch64_get_fpcr64()) {
    __builtin_aarch64_set_fpcr64(saved_ | 1ul << 24);
  }
  ~FlushDenormals() { __builtin_aarch64_set_fpcr64(saved_); }

 private:
  ulong saved_;
#else
  FlushDenormals() {}
#endif
};

class Refusal {
 public:
  Refusal(char* error, size_t size) : error_(error), size_(size) {}
  template <class... A>
  emu_status operator()(const char* format, A... arguments) {
    if (size_) snprintf(error_, size_, format, arguments...);
    return EMU_REFUSED;
  }

 private:
  char* error_;
  size_t size_;
};

// The tables of the API: entries of emu_kernel_table and emu_constant_table in the same order.
const std::vector<emu_kernel>& api_kernels() {
  static const std::vector<emu_kernel> all = [] {
    std::vector<emu_kernel> v;
    for (uint i = 0; i < emu_kernel_count; ++i) v.push_back(emu_kernel_table[i].kernel);
    return v;
  }();
  return all;
}
const std::vector<emu_function_constant>& api_constants() {
  static const std::vector<emu_function_constant> all = [] {
    std::vector<emu_function_constant> v;
    for (uint i = 0; i < emu_constant_count; ++i) v.push_back(emu_constant_table[i].constant);
    return v;
  }();
  return all;
}
const emu_kernel_entry* entry_of(const emu_kernel* kernel) {
  const std::vector<emu_kernel>& all = api_kernels();
  if (kernel < all.data() || kernel >= all.data() + all.size()) return nullptr;
  return &emu_kernel_table[kernel - all.data()];
}

emu_status set_constants(const emu_constant_value* values, uint count, Refusal refuse) {
  for (uint i = 0; i < emu_constant_count; ++i) {
    const emu_constant_entry& entry = emu_constant_table[i];
    *entry.defined = false;
    memset(entry.value, 0, entry.constant.size);
    for (uint k = 0; k < count; ++k) {
      if (values[k].index != entry.constant.index) continue;
      if (values[k].size != entry.constant.size)
        return refuse("function constant %s (index %u) is a %s of %u bytes, got a value of %u",
                      entry.constant.name, entry.constant.index, entry.constant.type,
                      entry.constant.size, values[k].size);
      memcpy(entry.value, values[k].value, entry.constant.size);
      *entry.defined = true;
    }
  }
  return EMU_OK;
}

void merge_spans() {
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.low < b.low; });
  size_t out = 0;
  for (size_t i = 1; i < spans.size(); ++i) {
    Span& a = spans[out];
    Span& b = spans[i];
    if (b.low < a.high) {
      a.high = std::max(a.high, b.high);
      a.read_only &= b.read_only;
      a.copy &= b.copy;
      a.granule = std::min(a.granule, b.granule);
      a.name += "+" + b.name;
    } else {
      spans[++out] = b;
    }
  }
  if (!spans.empty()) spans.resize(out + 1);
}

uint granule_of(const emu_param& param) {
  uint granule = 4;
  while (granule > 1 && (param.elem_size == 0 || param.elem_size % granule)) granule /= 2;
  return granule;
}

uint next_threadgroup() {
  const uint* groups = emu_now.threadgroups_per_grid;
  const uint index = next_index++;
  if (index >= groups[0] * groups[1] * groups[2]) return 0;
  group.threadgroup = index;
  group.position[0] = index % groups[0];
  group.position[1] = index / groups[0] % groups[1];
  group.position[2] = index / groups[0] / groups[1];
  uint threads = 1;
  for (int k = 0; k < 3; ++k) {
    const uint nominal = emu_now.nominal_threads_per_threadgroup[k];
    const uint left = emu_now.threads_per_grid[k] - group.position[k] * nominal;
    threads *= emu_now.threads_per_threadgroup[k] = std::min(nominal, left);
  }
  // Threadgroup memory holds nothing at the start: every float in it is a NaN.
  for (const Variable& v : variables) memset(v.block.data, 0xff, v.block.size);
  for (const Guarded& block : dynamic_memory) memset(block.data, 0xff, block.size);
  return threads;
}

emu_status prepare(const emu_kernel_entry& entry, void** buffers, void** threadgroup,
                   Refusal refuse) {
  const emu_launch& r = *request;
  const emu_kernel& kernel = entry.kernel;
  uint threads = 1;
  for (int k = 0; k < 3; ++k) {
    if (r.threads_per_threadgroup[k] == 0)
      return refuse("kernel %s: a threadgroup of no threads", kernel.name);
    if (r.threads_per_threadgroup[k] > EMU_MAX_THREADS) threads = EMU_MAX_THREADS + 1;
    threads *= r.threads_per_threadgroup[k];
    const uint size = r.threads_per_threadgroup[k];
    const bool in_threads = r.flags & EMU_LAUNCH_GRID_IN_THREADS;
    emu_now.nominal_threads_per_threadgroup[k] = size;
    emu_now.threadgroups_per_grid[k] = in_threads ? (r.grid[k] + size - 1) / size : r.grid[k];
    emu_now.threads_per_grid[k] = in_threads ? r.grid[k] : r.grid[k] * size;
  }
  if (threads > kernel.max_threads)
    return refuse("kernel %s: %u threads per threadgroup, its limit is %u", kernel.name, threads,
                  kernel.max_threads);
  const emu_status status = set_constants(r.constants, r.n_constants, refuse);
  if (status != EMU_OK) return status;

  const emu_buffer* bound[EMU_MAX_BUFFERS] = {};
  for (uint i = 0; i < r.n_buffers; ++i) {
    if (r.buffers[i].index >= EMU_MAX_BUFFERS)
      return refuse("buffer index %u is beyond 30", r.buffers[i].index);
    bound[r.buffers[i].index] = &r.buffers[i];
  }
  threadgroup_bytes = 0;
  for (uint i = 0; i < r.n_threadgroup_memory; ++i) {
    const emu_threadgroup_memory& memory = r.threadgroup_memory[i];
    if (memory.index >= EMU_MAX_BUFFERS)
      return refuse("threadgroup index %u is beyond 30", memory.index);
    if (memory.length % 16)
      return refuse("threadgroup memory %u: %u bytes is no multiple of 16", memory.index,
                    memory.length);
    threadgroup_bytes += memory.length;
  }
  if (threadgroup_bytes > EMU_MAX_THREADGROUP_BYTES)
    return refuse("kernel %s: %u bytes of threadgroup memory, the limit is %d", kernel.name,
                  threadgroup_bytes, EMU_MAX_THREADGROUP_BYTES);

  for (uint i = 0; i < kernel.n_params; ++i) {
    const emu_param& param = kernel.params[i];
    if (param.kind == EMU_PARAM_THREADGROUP) {
      bool found = false;
      for (uint k = 0; k < r.n_threadgroup_memory; ++k)
        found |= r.threadgroup_memory[k].index == param.index;
      if (!found)
        return refuse("kernel %s: threadgroup(%u) %s has no length", kernel.name, param.index,
                      param.name);
      continue;
    }
    const bool enabled = !entry.conditions[i] || entry.conditions[i]();
    if (!enabled) {  // a reference may be read early by the compiler, a pointer must not be
                     // followed
      if (!buffers[param.index])
        buffers[param.index] = param.is_reference ? zero_page() : unreadable_page();
      continue;
    }
    const emu_buffer* buffer = bound[param.index];
    if (!buffer || !buffer->data)
      return refuse("kernel %s: buffer(%u) %s is not bound", kernel.name, param.index, param.name);
    if (param.is_reference && buffer->length < param.elem_size)
      return refuse("kernel %s: buffer(%u) %s has %llu bytes, %u are read", kernel.name,
                    param.index, param.name, (unsigned long long)buffer->length, param.elem_size);
    char name[160];
    snprintf(name, sizeof name, "buffer(%u) %s", param.index, param.name);
    spans.push_back({(uintptr_t)buffer->data,
                     (uintptr_t)buffer->data + buffer->length,
                     (bool)param.is_read_only,
                     (buffer->flags & EMU_BUFFER_COPY) != 0,
                     granule_of(param),
                     name,
                     {}});
  }
  merge_spans();
  for (Span& span : spans) {
    const size_t size = span.high - span.low;
    char* data = (char*)span.low;
    if (span.copy) {
      span.block = guarded_allocate(size, span.low % 16, r.flags & EMU_LAUNCH_GUARD_LOW);
      data = span.block.data;
      memcpy(data, (const void*)span.low, size);
    }
    add_region(data, size, Space::kDevice, span.read_only, span.granule, span.name);
  }
  for (uint i = 0; i < kernel.n_params; ++i) {
    const emu_param& param = kernel.params[i];
    if (param.kind != EMU_PARAM_BUFFER || buffers[param.index]) continue;
    const uintptr_t address = (uintptr_t)bound[param.index]->data;
    for (const Span& span : spans)
      if (address >= span.low && address <= span.high &&
          (address < span.high || span.low == span.high))
        buffers[param.index] = span.copy ? span.block.data + (address - span.low) : (char*)address;
  }
  for (uint i = 0; i < r.n_threadgroup_memory; ++i) {
    const emu_threadgroup_memory& memory = r.threadgroup_memory[i];
    dynamic_memory.push_back(guarded_allocate(memory.length, 0, r.flags & EMU_LAUNCH_GUARD_LOW));
    threadgroup[memory.index] = dynamic_memory.back().data;
    char name[64];
    snprintf(name, sizeof name, "threadgroup(%u)", memory.index);
    add_region(threadgroup[memory.index], memory.length, Space::kThreadgroup, false, 4, name);
  }
  return EMU_OK;
}

// Writes copies back, looks for stray writes beside them, and lets everything go.
void finish(std::string* damage) {
  for (const Span& span : spans) {
    if (!span.copy) continue;
    long offset;
    if (!span.read_only) {
      memcpy((void*)span.low, span.block.data, span.block.size);
    } else if (damage->empty() &&
               memcmp((const void*)span.low, span.block.data, span.block.size) != 0) {
      *damage = "WRITE to the read-only " + span.name;
    }
    if (damage->empty() && guarded_damage(span.block, &offset))
      *damage = "OUT OF BOUNDS write at byte " + std::to_string(offset) + " of " + span.name +
                " (" + std::to_string(span.block.size) + " bytes)";
    guarded_release(span.block);
  }
  for (const Variable& v : variables) {
    long offset;
    if (damage->empty() && guarded_damage(v.block, &offset))
      *damage = "OUT OF BOUNDS write at byte " + std::to_string(offset) + " of threadgroup " +
                v.variable->name + " (" + std::to_string(v.block.size) + " bytes)";
    guarded_release(v.block);
  }
  for (const Guarded& block : dynamic_memory) {
    long offset;
    if (damage->empty() && guarded_damage(block, &offset))
      *damage = "OUT OF BOUNDS write at byte " + std::to_string(offset) +
                " of threadgroup memory (" + std::to_string(block.size) + " bytes)";
    guarded_release(block);
  }
  spans.clear();
  variables.clear();
  dynamic_memory.clear();
  clear_regions();
}

emu_status launch(const emu_launch* r, char* error, size_t error_size) {
  const std::lock_guard<std::mutex> lock(launch_lock);
  Refusal refuse(error, error_size);
  if (error_size) error[0] = 0;
  const emu_kernel_entry* entry = r->kernel ? entry_of(r->kernel) : nullptr;
  if (!entry) return refuse("%s", "no such kernel in this library");
  request = r;
  emu_now = emu_dispatch{};
  emu_now.launch = ++launches;
  next_index = 0;
  static void *buffers[EMU_MAX_BUFFERS],
      *threadgroup[EMU_MAX_BUFFERS];  // in the image, which kernels may read
  std::fill(std::begin(buffers), std::end(buffers), nullptr);
  std::fill(std::begin(threadgroup), std::end(threadgroup), nullptr);
  static Fault fault;
  fault.raised = false;
  fault.message.clear();
  current_fault = &fault;
  std::string damage;
  emu_status status;
  const FlushDenormals flush;
  // Evaluating the conditions of buffers may already meet an unset function constant.
  fault.launching = true;
  if (sigsetjmp(fault.escape, 1) == 0) {
    install_segv_handler();
    status = prepare(*entry, buffers, threadgroup, refuse);
    if (status == EMU_OK) {
      begin_checks();
      const Run run = {entry->run, buffers, threadgroup, r->flags, r->seed};
      run_threadgroups(run, next_threadgroup);
    }
  } else {
    status = EMU_FAULT;
    clear_stack_shadow();
  }
  release_stacks();
  fault.launching = false;
  current_fault = nullptr;
  emu_current = nullptr;
  if (!variables.empty()) {
    uint& bytes = static_bytes[r->kernel];
    bytes = std::max(bytes, threadgroup_bytes);
  }
  finish(&damage);
  if (status == EMU_OK && !damage.empty()) {
    status = EMU_FAULT;
    fault.message = damage;
  }
  if (status == EMU_FAULT && error_size)
    snprintf(error, error_size, "kernel %s, %s", entry->kernel.name, fault.message.c_str());
  return status;
}

emu_status check_constants(const emu_kernel* kernel, const emu_constant_value* values, uint count,
                           char* error, size_t error_size) {
  Refusal refuse(error, error_size);
  for (uint i = 0; i < kernel->n_function_constants; ++i) {
    const emu_function_constant& constant =
        emu_constant_table[kernel->function_constants[i]].constant;
    const emu_constant_value* value = nullptr;
    for (uint k = 0; k < count; ++k)
      if (values[k].index == constant.index) value = &values[k];
    if (!value && emu_constant_table[kernel->function_constants[i]].is_optional) continue;
    if (!value)
      return refuse("kernel %s: function constant %s (index %u, %s) has no value", kernel->name,
                    constant.name, constant.index, constant.type);
    if (value->size != constant.size)
      return refuse(
          "kernel %s: function constant %s (index %u) is a %s of %u bytes, got a value of %u",
          kernel->name, constant.name, constant.index, constant.type, constant.size, value->size);
  }
  return EMU_OK;
}

uint static_threadgroup_bytes(const emu_kernel* kernel) {
  const std::lock_guard<std::mutex> lock(launch_lock);
  const auto found = static_bytes.find(kernel);
  return found == static_bytes.end() ? 0 : found->second;
}

}  // namespace

uint run_flags() { return request->flags; }

}  // namespace emu

using namespace emu;

extern "C" {

void emu_allocate_threadgroup(emu_threadgroup_variable* variable) {
  threadgroup_bytes += variable->size;
  if (threadgroup_bytes > EMU_MAX_THREADGROUP_BYTES)
    fail("TOO MUCH threadgroup memory: %u bytes with %s, the limit is %d", threadgroup_bytes,
         variable->name, EMU_MAX_THREADGROUP_BYTES);
  const Guarded block = guarded_allocate(variable->size, 0, request->flags & EMU_LAUNCH_GUARD_LOW);
  memset(block.data, 0xff, block.size);
  variables.push_back({variable, block});
  uint granule = 4;
  while (variable->size % granule) granule /= 2;
  add_region(block.data, block.size, Space::kThreadgroup, false, granule,
             std::string("threadgroup ") + variable->name);
  variable->memory = block.data;
  variable->launch = emu_now.launch;
}

__attribute__((visibility("default"))) const emu_api* emu_get_api() {
  static const emu_api api = {EMU_ABI_VERSION,
                              kMode,
                              api_kernels().data(),
                              (uint)api_kernels().size(),
                              api_constants().data(),
                              (uint)api_constants().size(),
                              launch,
                              check_constants,
                              static_threadgroup_bytes};
  return &api;
}

#if defined(__x86_64__)
// libgcc 12 lacks these, which clang calls for bfloat.
static uint16_t round_to_bfloat(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
typedef __bf16 bfloat;
bfloat __truncsfbf2(float x) {
  const uint16_t bits = round_to_bfloat(x);
  bfloat r;
  memcpy(&r, &bits, 2);
  return r;
}
bfloat __truncdfbf2(double x) { return __truncsfbf2((float)x); }
#endif

}  // extern "C"
