// Shared by the parts of the runtime. A copy of it is linked into every kernel library.
#pragma once

#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>

#include <string>
#include <vector>

#include "../emu.h"

typedef unsigned int uint;
typedef unsigned long ulong;

// ---- shared with the shim (shim/base.h and shim/entry.h declare the same)
struct emu_thread {
  uint position_in_grid[3];
  uint position_in_threadgroup[3];
  uint threadgroup_position[3];
  uint index_in_threadgroup;
};
struct emu_dispatch {
  uint threads_per_threadgroup[3];
  uint nominal_threads_per_threadgroup[3];
  uint threadgroups_per_grid[3];
  uint threads_per_grid[3];
  uint simdgroups;
  ulong launch;
};
struct emu_site {
  const char* file;
  uint line;
  uint column;
};
struct emu_threadgroup_variable {
  uint size, align;
  const char* name;
  void* memory;
  ulong launch;
};
typedef void (*emu_reduce_fn)(char* slots, uint active, void* result);
struct emu_kernel_entry {
  emu_kernel kernel;
  void (*run)(void* const* buffers, void* const* threadgroup);
  bool (*const* conditions)();
};
struct emu_constant_entry {
  emu_function_constant constant;
  void* value;
  bool* defined;
  bool is_optional;  // the source asks whether it is defined
};
extern "C" {
extern const emu_kernel_entry emu_kernel_table[];
extern const uint emu_kernel_count;
extern const emu_constant_entry emu_constant_table[];
extern const uint emu_constant_count;
extern emu_thread* emu_current;
extern emu_dispatch emu_now;
}

namespace emu {

constexpr size_t kStackSize = 256 << 10;
constexpr size_t kPage = 4096;
constexpr uint kLanes = 32;
constexpr uint kMaxSimdgroups = EMU_MAX_THREADS / kLanes;
constexpr uint kFlagDevice = 1, kFlagThreadgroup = 2;  // mem_flags of the shim

#if defined(EMU_RACE)
constexpr bool kRace = true;
#else
constexpr bool kRace = false;
#endif
#if defined(EMU_ASAN)
constexpr bool kAsan = true;
#else
constexpr bool kAsan = false;
#endif

// ---- fault.cpp: how a launch ends early
struct Fault {
  bool launching = false;
  bool raised = false;
  std::string message;
  sigjmp_buf escape;
};
extern thread_local Fault* current_fault;
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void install_segv_handler();

// ---- regions.cpp: the memory a kernel may touch
enum class Space : uint8_t { kDevice, kThreadgroup };
struct Cell;
struct Region {
  uintptr_t low, high;
  Space space;
  bool read_only;
  uint granule;  // bytes per cell of the race detector
  std::string name;
  Cell* cells = nullptr;
  size_t cells_bytes = 0;
};
extern std::vector<Region> regions;
Region* find_region(uintptr_t address);
const Region* nearest_region(uintptr_t address);
void add_region(void* data, size_t size, Space space, bool read_only, uint granule,
                std::string name);
void clear_regions();

struct Guarded {
  char* map = nullptr;  // guard, body, guard
  size_t body = 0;
  char* data = nullptr;
  size_t size = 0;
};
Guarded guarded_allocate(size_t size, uint misalignment, bool guard_low);
// Offset of a stray write in the slack of the body, relative to data; false where there is none.
bool guarded_damage(const Guarded& block, long* offset);
void guarded_release(const Guarded& block);
void* unreadable_page();
void* zero_page();

// ---- fibers.cpp: the threads of one threadgroup
struct Group {
  uint threads = 0;       // of this threadgroup
  uint threadgroup = 0;   // linear index
  uint position[3];       // in the grid of threadgroups
  uint barrier_epoch[2];  // per Space: counts the barriers that order it
  uint simd_epoch[2][kMaxSimdgroups];
};
extern Group group;
struct Run {
  void (*kernel)(void* const*, void* const*);
  void* const* buffers;
  void* const* threadgroup;
  uint flags;
  uint seed;
};
// Runs threadgroups one after the other; `next` prepares each (position, emu_now) and returns its
// size, 0 at the end.
void run_threadgroups(const Run& run, uint (*next)());
bool in_fiber_stack(uintptr_t address);
bool in_stack_guard(uintptr_t address);
/// Gives the stacks of the last run_threadgroups back, however it ended.
void release_stacks();
uintptr_t stacks_low();

// ---- access.cpp: every load and store of the race and asan builds
enum class Access : uint8_t { kRead, kWrite, kAtomicRead, kAtomicWrite };
void check_access(uintptr_t address, size_t size, Access kind, uintptr_t pc);
void settle();  // decides on a store that was seen before it happened
void begin_checks();
uintptr_t code_offset(uintptr_t pc);

// ---- sanitizers.cpp: what only the asan build knows
void check_stack(uintptr_t address, size_t size, Access kind, uintptr_t pc);
void check_global(uintptr_t address, size_t size, Access kind, uintptr_t pc);
void clear_stack_shadow();

// ---- launch.cpp
uint run_flags();  // EMU_LAUNCH_* of the launch that runs

}  // namespace emu
