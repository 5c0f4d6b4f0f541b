// Threads of a threadgroup as fibers. They switch only where threads meet: barriers and simdgroup
// functions. A thread that never waits runs on the stack of the one before it.
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <random>

#include "runtime.h"
#include "swap.h"

extern "C" {
emu_thread* emu_current;
emu_dispatch emu_now;
}

namespace emu {

Group group;

namespace {

struct Fiber {
  void* sp;
  char* top;
};
enum class Wait : uint8_t { kNothing, kSimdgroup, kThreadgroup };
struct ThreadState {
  Fiber* fiber;  // null before the thread starts
  Wait wait;
  const char* operation;
  emu_site site;
  uintptr_t pc;
  const void* value;  // what the thread brings to a simdgroup function
  uint size;
  emu_reduce_fn reduce;
  uint active;  // lanes that took part, once it has run
};
struct Simdgroup {
  uint lanes;    // mask of the lanes it has
  uint live;     // those that have not returned
  uint waiting;  // those that wait in a simdgroup function
};

/// Stacks, each with a guard page below it.
struct Stacks {
  char* base = nullptr;
  std::vector<Fiber*> fibers;
};

/// At the start of the pool that the libraries of a process share. Guard pages are mappings, of
/// which a process may have 65,530: with stacks of their own, some 200 libraries used them up.
struct Pool {
  std::atomic<uint> magic;    ///< written last by the library that made the pool
  std::atomic<uint> taken;    ///< a launch is using the stacks
  std::atomic<uint> guarded;  ///< stacks that have their guard page
};
constexpr uint kPoolMagic = 0x6b767101;
constexpr uintptr_t kPoolAddress = 0x3e0000000000;  // one that all libraries know

Stacks pool_stacks, own_stacks;
Stacks* set = &own_stacks;
char* stacks = nullptr;  // set->base
std::vector<Fiber*> free_fibers;

char* map_stacks(void* address, size_t header, int flags) {
  void* map = mmap(address, header + EMU_MAX_THREADS * kStackSize, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | flags, -1, 0);
  return map == MAP_FAILED ? nullptr : (char*)map;
}

/// The pool, made by the first library to ask; null where it cannot be had.
Pool* shared_pool() {
  static Pool* const pool = [] {
    Pool* const there = (Pool*)kPoolAddress;
#ifdef MAP_FIXED_NOREPLACE
    if (map_stacks(there, kPage, MAP_FIXED_NOREPLACE) == (char*)there) {
      there->magic = kPoolMagic;
      return there;
    }
    if (errno == EEXIST && there->magic == kPoolMagic) return there;
#endif
    return (Pool*)nullptr;
  }();
  return pool;
}

/// The shared stacks, or this library's own while another launch of the process has them.
void take_stacks() {
  Pool* const pool = shared_pool();
  if (pool && pool->taken.exchange(1) == 0) {
    set = &pool_stacks;
    set->base = (char*)pool + kPage;
  } else {
    set = &own_stacks;
    if (!set->base) set->base = map_stacks(nullptr, 0, 0);
  }
  stacks = set->base;
}
emu_thread threads[EMU_MAX_THREADS];
ThreadState states[EMU_MAX_THREADS];
Simdgroup simdgroups[kMaxSimdgroups];
alignas(64) char slots[kMaxSimdgroups][kLanes * 64];
alignas(64) char results[kMaxSimdgroups][64];

// Scheduling is in positions: a seed permutes simdgroups, and lanes within each.
uint runnable[kMaxSimdgroups];  // per position of a simdgroup: lanes (by position) that are ready
                                // or not started
uint runnable_groups;
uint16_t thread_at[EMU_MAX_THREADS], position_of[EMU_MAX_THREADS];

uint current_thread, live_threads, barrier_arrived;
Fiber* current_fiber;
emu_site barrier_site;
const Run* run;
uint (*prepare_next)();
std::mt19937 shuffle;
void* main_sp;

inline void make_runnable(uint thread) {
  const uint p = position_of[thread];
  runnable[p / kLanes] |= 1u << (p % kLanes);
  runnable_groups |= 1u << (p / kLanes);
}

// Takes the next thread that can run: of the same simdgroup if possible. Returns -1 where all wait.
inline int take_next() {
  uint p = position_of[current_thread];
  uint g = p / kLanes;
  uint mask = runnable[g];
  if (mask) {
    const uint later = mask & ~((2u << (p % kLanes)) - 1);
    if (later) mask = later;
  } else {
    uint groups = runnable_groups;
    if (!groups) return -1;
    const uint later = groups & ~((2u << g) - 1);
    g = __builtin_ctz(later ? later : groups);
    mask = runnable[g];
  }
  const uint lane = __builtin_ctz(mask);
  runnable[g] &= ~(1u << lane);
  if (!runnable[g]) runnable_groups &= ~(1u << g);
  return thread_at[g * kLanes + lane];
}

void worker();

Fiber* take_fiber() {
  if (free_fibers.empty()) {
    // Tops are staggered, as stacks a power of two apart would share the same few cache sets.
    const size_t n = set->fibers.size();
    char* base = stacks + n * kStackSize;
    const bool guarded = set == &pool_stacks && n < shared_pool()->guarded;
    if (!guarded) mprotect(base, kPage, PROT_NONE);
    if (!guarded && set == &pool_stacks) shared_pool()->guarded = n + 1;
    set->fibers.push_back(new Fiber{nullptr, base + kStackSize - (n * 17 % 61) * 192});
    free_fibers.push_back(set->fibers.back());
  }
  Fiber* fiber = free_fibers.back();
  free_fibers.pop_back();
  fiber->sp = emu_fresh_stack(fiber->top, worker);
  return fiber;
}

inline void switch_to(uint thread, Fiber* from) {
  current_thread = thread;
  emu_current = &threads[thread];
  Fiber* to = states[thread].fiber;
  if (!to) to = take_fiber();
  current_fiber = to;
  emu_swap(&from->sp, to->sp);
}

std::string describe(const emu_site& site) {
  char text[512];
  snprintf(text, sizeof text, "%s:%u", site.file, site.line);
  return text;
}

[[noreturn]] void fail_deadlock() {
  std::map<std::string, std::pair<uint, uint>> waits;  // place: first thread, threads
  uint returned = 0;
  for (uint t = 0; t < group.threads; ++t) {
    if (states[t].wait == Wait::kNothing) {
      ++returned;
      continue;
    }
    auto& entry =
        waits
            .try_emplace(std::string(states[t].operation) + " at " + describe(states[t].site), t,
                         0u)
            .first->second;
    ++entry.second;
  }
  std::string text;
  for (const auto& [place, count] : waits) {
    char part[96];
    snprintf(part, sizeof part, "%s%u thread%s (first %u) wait in ", text.empty() ? "" : "; ",
             count.second, count.second == 1 ? "" : "s", count.first);
    text += part + place;
  }
  fail("DIVERGENCE: %s; %u have returned", text.c_str(), returned);
}

// Runs the simdgroup function in which `active` lanes of a simdgroup wait, and lets all but `self`
// go on.
void complete(uint s, uint active, int self) {
  const uint first = s * kLanes + __builtin_ctz(active);
  for (uint lanes = active; lanes; lanes &= lanes - 1) {
    const uint lane = __builtin_ctz(lanes);
    memcpy(slots[s] + 64 * lane, states[s * kLanes + lane].value, states[s * kLanes + lane].size);
  }
  if (states[first].reduce) states[first].reduce(slots[s], active, results[s]);
  for (uint lanes = active; lanes; lanes &= lanes - 1) {
    const uint t = s * kLanes + __builtin_ctz(lanes);
    states[t].active = active;
    states[t].wait = Wait::kNothing;
    if ((int)t != self) make_runnable(t);
  }
  simdgroups[s].waiting &= ~active;
}

bool same_place(const ThreadState& a, const ThreadState& b) {
  return a.pc == b.pc && a.site.line == b.site.line && a.site.column == b.site.column &&
         a.operation == b.operation;
}

// Lanes of a simdgroup that wait where `thread` does.
uint lanes_with(uint s, const ThreadState& thread) {
  uint mask = 0;
  for (uint lanes = simdgroups[s].waiting; lanes; lanes &= lanes - 1) {
    const uint lane = __builtin_ctz(lanes);
    if (same_place(states[s * kLanes + lane], thread)) mask |= 1u << lane;
  }
  return mask;
}

// Nothing can run. Where that is allowed, lets the lanes of one simdgroup that wait in the same
// place go on without the others. The lowest address goes first: code inside a loop or branch lies
// before the code where its lanes meet again.
bool complete_partially() {
  if (!(run->flags & EMU_LAUNCH_PARTIAL_SIMD)) return false;
  bool any = false;
  for (uint s = 0; s * kLanes < group.threads; ++s) {
    const uint waiting = simdgroups[s].waiting;
    if (!waiting) continue;
    const ThreadState* first = &states[s * kLanes + __builtin_ctz(waiting)];
    for (uint lanes = waiting; lanes; lanes &= lanes - 1) {
      const ThreadState& other = states[s * kLanes + __builtin_ctz(lanes)];
      if (other.pc < first->pc) first = &other;
    }
    complete(s, lanes_with(s, *first), -1);
    any = true;
  }
  return any;
}

int take_next_or_fail() {
  int next = take_next();
  if (next < 0 && complete_partially()) next = take_next();
  if (next < 0) fail_deadlock();
  return next;
}

// The running thread waits until somebody makes it runnable.
void wait_here(Wait kind, const char* operation, const emu_site& site) {
  ThreadState& state = states[current_thread];
  state.wait = kind;
  state.operation = operation;
  state.site = site;
  state.fiber = current_fiber;
  const uint self = current_thread;
  const int next = take_next_or_fail();
  if ((uint)next != self) switch_to(next, state.fiber);
}

bool begin_threadgroup() {
  const uint count = prepare_next();
  if (!count) return false;
  const bool resized = count != group.threads || run->seed;
  group.threads = live_threads = count;
  barrier_arrived = 0;
  ++group.barrier_epoch[0];
  ++group.barrier_epoch[1];
  memset(states, 0, count * sizeof states[0]);
  const uint groups = (count + kLanes - 1) / kLanes;
  emu_now.simdgroups = groups;
  if (resized) {
    uint order[kMaxSimdgroups];
    for (uint s = 0; s < groups; ++s) order[s] = s;
    if (run->seed) std::shuffle(order, order + groups, shuffle);
    for (uint p = 0; p < groups; ++p) {
      uint lanes[kLanes];
      const uint size = std::min(kLanes, count - order[p] * kLanes);
      for (uint l = 0; l < size; ++l) lanes[l] = l;
      if (run->seed) std::shuffle(lanes, lanes + size, shuffle);
      for (uint l = 0; l < size; ++l) {
        thread_at[p * kLanes + l] = order[p] * kLanes + lanes[l];
        position_of[order[p] * kLanes + lanes[l]] = p * kLanes + l;
      }
    }
  }
  for (uint p = 0; p < groups; ++p) {
    const uint s = thread_at[p * kLanes] / kLanes;
    const uint size = std::min(kLanes, count - s * kLanes);
    const uint mask = size == kLanes ? ~0u : (1u << size) - 1;
    runnable[p] = mask;
    simdgroups[s] = {mask, mask, 0};
  }
  runnable_groups = groups == kMaxSimdgroups ? ~0u : (1u << groups) - 1;
  current_thread = thread_at[0];
  runnable[0] &= ~1u;
  if (!runnable[0]) runnable_groups &= ~1u;
  return true;
}

inline void start_thread(uint t) {
  const uint* size = emu_now.threads_per_threadgroup;
  emu_thread& thread = threads[t];
  const uint position[3] = {t % size[0], t / size[0] % size[1], t / (size[0] * size[1])};
  for (int k = 0; k < 3; ++k) {
    thread.threadgroup_position[k] = group.position[k];
    thread.position_in_threadgroup[k] = position[k];
    thread.position_in_grid[k] =
        group.position[k] * emu_now.nominal_threads_per_threadgroup[k] + position[k];
  }
  thread.index_in_threadgroup = t;
  emu_current = &thread;
}

void finish_thread() {
  settle();
  const uint t = current_thread, s = t / kLanes;
  Simdgroup& simdgroup = simdgroups[s];
  simdgroup.live &= ~(1u << (t % kLanes));
  --live_threads;
  if (run->flags & EMU_LAUNCH_PARTIAL_SIMD) {
    if (simdgroup.waiting && simdgroup.waiting == simdgroup.live) {
      const uint first = __builtin_ctz(simdgroup.waiting);
      if (lanes_with(s, states[s * kLanes + first]) == simdgroup.live)
        complete(s, simdgroup.live, -1);
    }
  } else if (simdgroup.waiting && simdgroup.waiting == simdgroup.live) {
    const ThreadState& other = states[s * kLanes + __builtin_ctz(simdgroup.waiting)];
    fail("DIVERGENCE: the thread returned while its simdgroup waits in %s at %s", other.operation,
         describe(other.site).c_str());
  }
}

// What a fiber does: thread after thread, until one that waits elsewhere can go on.
void worker() {
  for (;;) {
    start_thread(current_thread);
    run->kernel(run->buffers, run->threadgroup);
    finish_thread();
    int next;
    if (!live_threads) {
      emu_current = nullptr;
      if (!begin_threadgroup()) {
        void* ignored;
        emu_swap(&ignored, main_sp);
      }
      next = current_thread;
    } else {
      next = take_next_or_fail();
    }
    if (states[next].fiber) {
      Fiber* mine = current_fiber;
      free_fibers.push_back(mine);
      switch_to(next, mine);
    }
    current_thread = next;
  }
}

}  // namespace

bool in_fiber_stack(uintptr_t address) {
  return address - (uintptr_t)stacks < EMU_MAX_THREADS * kStackSize;
}
uintptr_t stacks_low() { return (uintptr_t)stacks; }
bool in_stack_guard(uintptr_t address) {
  return in_fiber_stack(address) && (address - (uintptr_t)stacks) % kStackSize < kPage;
}

void run_threadgroups(const Run& request, uint (*next)()) {
  take_stacks();
  free_fibers = set->fibers;  // a launch that ended in a fault has left some behind
  run = &request;
  prepare_next = next;
  shuffle.seed(request.seed);
  group = Group{};
  for (auto& epochs : group.simd_epoch) std::fill(std::begin(epochs), std::end(epochs), 1u);
  if (!begin_threadgroup()) return;
  current_fiber = take_fiber();
  emu_swap(&main_sp, current_fiber->sp);
  emu_current = nullptr;
}

void release_stacks() {
  if (set == &pool_stacks) shared_pool()->taken = 0;
  set = &own_stacks;
}

}  // namespace emu

using namespace emu;

extern "C" {

const char* emu_simd_exchange(const char* name, const emu_site& site, const void* value, uint size,
                              emu_reduce_fn reduce, uint* active) {
  settle();
  const uint t = current_thread, s = t / kLanes;
  Simdgroup& simdgroup = simdgroups[s];
  ThreadState& state = states[t];
  const bool partial = run->flags & EMU_LAUNCH_PARTIAL_SIMD;
  state.pc = (uintptr_t)__builtin_return_address(0);
  state.operation = name;
  state.site = site;
  state.value = value;
  state.size = size;
  state.reduce = reduce;
  if (!partial) {
    // In one piece of source, inlined twice or unrolled, the same operation may have several
    // addresses.
    if (simdgroup.waiting) {
      const ThreadState& other = states[s * kLanes + __builtin_ctz(simdgroup.waiting)];
      if (other.site.line != site.line || other.site.column != site.column ||
          strcmp(other.operation, name) != 0)
        fail(
            "DIVERGENCE: %s at %s while its simdgroup is in %s at %s (Metal runs simdgroup "
            "functions on the active "
            "lanes: EMU_LAUNCH_PARTIAL_SIMD does too)",
            name, describe(site).c_str(), other.operation, describe(other.site).c_str());
    }
    if (simdgroup.live != simdgroup.lanes)
      fail("DIVERGENCE: %s at %s after %d of %d lanes have returned", name, describe(site).c_str(),
           __builtin_popcount(simdgroup.lanes & ~simdgroup.live),
           __builtin_popcount(simdgroup.lanes));
  }
  simdgroup.waiting |= 1u << (t % kLanes);
  if (simdgroup.waiting == simdgroup.live && (!partial || lanes_with(s, state) == simdgroup.live))
    complete(s, simdgroup.live, t);
  else
    wait_here(Wait::kSimdgroup, name, site);
  *active = state.active;
  return reduce ? results[s] : slots[s];
}

void emu_simdgroup_barrier(uint flags, const emu_site& site) {
  const uint s = current_thread / kLanes;
  const uint before[2] = {group.simd_epoch[0][s], group.simd_epoch[1][s]};
  uint active;
  const char nothing = 0;
  emu_simd_exchange("simdgroup_barrier", site, &nothing, 1, nullptr, &active);
  // The first lane to leave counts the barrier.
  if (group.simd_epoch[0][s] == before[0] && (flags & kFlagDevice)) ++group.simd_epoch[0][s];
  if (group.simd_epoch[1][s] == before[1] && (flags & kFlagThreadgroup)) ++group.simd_epoch[1][s];
}

void emu_threadgroup_barrier(uint flags, const emu_site& site) {
  settle();
  if (barrier_arrived && (barrier_site.line != site.line || barrier_site.column != site.column))
    fail("DIVERGENCE: threadgroup_barrier at %s while others wait in the one at %s",
         describe(site).c_str(), describe(barrier_site).c_str());
  if (live_threads != group.threads)
    fail("DIVERGENCE: threadgroup_barrier at %s after %u threads have returned",
         describe(site).c_str(), group.threads - live_threads);
  barrier_site = site;
  if (++barrier_arrived < live_threads) {
    wait_here(Wait::kThreadgroup, "threadgroup_barrier", site);
    return;
  }
  barrier_arrived = 0;
  if (flags & kFlagDevice) ++group.barrier_epoch[0];
  if (flags & kFlagThreadgroup) ++group.barrier_epoch[1];
  for (uint t = 0; t < group.threads; ++t) {
    states[t].wait = Wait::kNothing;
    if (t != current_thread) make_runnable(t);
  }
}

void emu_unset_constant(const char* name) {
  fail("UNSET function constant %s: the pipeline has no value for it", name);
}

}  // extern "C"
