// The race and asan builds report every load and store here, before it happens: clang's
// KernelAddressSanitizer instrumentation with callbacks of our own. Bounds are checked in both
// builds. The race build keeps, per cell of memory, the last write and the last two reads and asks
// whether a barrier lies between them and a new access. The asan build adds arrays on a thread's
// stack and constant arrays, and undefined behaviour (ubsan.cpp).
#include <link.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <new>

#include "runtime.h"

namespace emu {

// One access: threadgroup, thread, and the barriers it had seen.
struct Mark {
  uint64_t valid : 1, atomic : 1, threadgroup : 24, thread : 10, barrier : 14, simd_barrier : 14;
};
struct Cell {
  Mark write, read[2];
  uint write_pc, read_pc[2];
};

namespace {

uintptr_t image_low, image_high;  // this library: its constants and the runtime's own tables

// A store is seen before it happens. Two threads storing the same value is no fault in practice, so
// such a clash is kept until the next event, and dropped where the bytes have not changed.
struct Pending {
  uintptr_t address;
  size_t size = 0;
  char before[64];
  std::string message;
} pending;

inline uint64_t bits(const Mark& m) {
  uint64_t b;
  memcpy(&b, &m, sizeof b);
  return b;
}

const char* name_of(Access kind) {
  switch (kind) {
    case Access::kRead:
      return "read";
    case Access::kWrite:
      return "write";
    case Access::kAtomicRead:
      return "atomic read";
    default:
      return "atomic write";
  }
}

// Whether two accesses of one cell, at least one of them a write, are unordered.
bool unordered(const Mark& a, const Mark& b, Space space) {
  if (!a.valid || (a.atomic && b.atomic)) return false;
  if (a.threadgroup != b.threadgroup) return space == Space::kDevice;
  if (a.thread == b.thread || a.barrier != b.barrier) return false;
  if (a.thread / kLanes != b.thread / kLanes) return true;
  return a.simd_barrier == b.simd_barrier && !(run_flags() & EMU_LAUNCH_ALLOW_LOCKSTEP);
}

std::string race_message(const Region& region, uintptr_t address, const char* mine, uintptr_t pc,
                         const char* theirs, const Mark& other, uint other_pc, const Mark& me) {
  const char* relation = other.threadgroup != me.threadgroup ? "between threadgroups"
                         : other.thread / kLanes != me.thread / kLanes
                             ? "between simdgroups"
                             : "inside a simdgroup (lock-step hides it on hardware)";
  char text[512];
  snprintf(text, sizeof text,
           "RACE %s on %s at byte %zu: %s [pc 0x%lx] against %s by thread %u of threadgroup %u [pc "
           "0x%x]",
           relation, region.name.c_str(), (size_t)(address - region.low), mine, (ulong)pc, theirs,
           (uint)other.thread, (uint)other.threadgroup, other_pc);
  return text;
}

Cell* make_cells(size_t count, size_t* bytes) {
  *bytes = count * sizeof(Cell);
  return (Cell*)mmap(nullptr, *bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

void refine(Region& region, uint granule) {
  const size_t size = region.high - region.low;
  size_t bytes;
  Cell* cells = make_cells(size / granule + 1, &bytes);
  const uint ratio = region.granule / granule;
  for (size_t i = 0; i < size / region.granule; ++i)
    if (bits(region.cells[i].write) || bits(region.cells[i].read[0]))
      for (uint k = 0; k < ratio; ++k) cells[i * ratio + k] = region.cells[i];
  munmap((void*)region.cells, region.cells_bytes);
  region.cells = cells;
  region.cells_bytes = bytes;
  region.granule = granule;
}

void check_race(Region& region, uintptr_t address, size_t size, Access kind, uintptr_t pc) {
  const bool is_write = kind == Access::kWrite || kind == Access::kAtomicWrite;
  const bool is_atomic = kind == Access::kAtomicRead || kind == Access::kAtomicWrite;
  const size_t offset = address - region.low;
  if (!region.cells)
    region.cells = make_cells((region.high - region.low) / region.granule + 1, &region.cells_bytes);
  while ((offset | size) & (region.granule - 1)) refine(region, region.granule / 2);
  const uint space = (uint)region.space, thread = emu_current->index_in_threadgroup;
  Mark me{};
  me.valid = 1;
  me.atomic = is_atomic;
  me.threadgroup = group.threadgroup;
  me.thread = thread;
  me.barrier = group.barrier_epoch[space];
  me.simd_barrier = group.simd_epoch[space][thread / kLanes];
  const size_t first = offset / region.granule, last = (offset + size - 1) / region.granule;
  for (size_t i = first; i <= last; ++i) {
    Cell& cell = region.cells[i];
    const uintptr_t at = region.low + i * region.granule;
    if (unordered(cell.write, me, region.space)) {
      std::string message =
          race_message(region, at, name_of(kind), pc, cell.write.atomic ? "atomic write" : "write",
                       cell.write, cell.write_pc, me);
      const bool may_be_equal = kind == Access::kWrite &&
                                cell.write.threadgroup == me.threadgroup &&
                                size <= sizeof pending.before;
      if (!may_be_equal) fail("%s", message.c_str());
      if (!pending.size) {
        pending.address = address;
        pending.size = size;
        memcpy(pending.before, (const void*)address, size);
        pending.message = message + " of another value";
      }
    }
    if (is_write) {
      for (int k = 0; k < 2; ++k)
        if (unordered(cell.read[k], me, region.space))
          fail("%s", race_message(region, at, name_of(kind), pc,
                                  cell.read[k].atomic ? "atomic read" : "read", cell.read[k],
                                  cell.read_pc[k], me)
                         .c_str());
      cell.write = me;
      cell.write_pc = (uint)pc;
    } else {
      if (region.space == Space::kThreadgroup &&
          (!cell.write.valid || cell.write.threadgroup != me.threadgroup))
        fail("UNINITIALISED read of %s at byte %zu [pc 0x%lx]", region.name.c_str(),
             (size_t)(at - region.low), (ulong)pc);
      const Mark& r = cell.read[0];
      const bool keep = r.valid && r.thread != me.thread && r.threadgroup == me.threadgroup &&
                        r.barrier == me.barrier;
      cell.read[keep] = me;
      cell.read_pc[keep] = (uint)pc;
    }
  }
}

}  // namespace

uintptr_t code_offset(uintptr_t pc) { return pc - image_low; }

void settle() {
  if (!kRace || !pending.size) return;
  const size_t size = pending.size;
  pending.size = 0;
  if (memcmp(pending.before, (const void*)pending.address, size) != 0)
    fail("%s", pending.message.c_str());
}

void begin_checks() {
  pending.size = 0;
  if (image_low) return;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        uintptr_t low = ~(uintptr_t)0, high = 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const ElfW(Phdr) & header = info->dlpi_phdr[i];
          if (header.p_type != PT_LOAD) continue;
          low = std::min(low, (uintptr_t)(info->dlpi_addr + header.p_vaddr));
          high = std::max(high, (uintptr_t)(info->dlpi_addr + header.p_vaddr + header.p_memsz));
        }
        if ((uintptr_t)&image_low < low || (uintptr_t)&image_low >= high) return 0;
        image_low = low;
        image_high = high;
        return 1;
      },
      nullptr);
}

void check_access(uintptr_t address, size_t size, Access kind, uintptr_t pc) {
  if (!emu_current || size == 0) return;
  settle();
  if (in_fiber_stack(address)) {
    if (kAsan) check_stack(address, size, kind, code_offset(pc));
    return;
  }
  pc = code_offset(pc);
  const bool is_write = kind == Access::kWrite || kind == Access::kAtomicWrite;
  if (Region* region = find_region(address)) {
    const char* place = region->name.c_str();
    if (address + size > region->high)
      fail("OUT OF BOUNDS %s of %zu bytes at byte %zu of %s (%zu bytes) [pc 0x%lx]", name_of(kind),
           size, (size_t)(address - region->low), place, (size_t)(region->high - region->low),
           (ulong)pc);
    if (is_write && region->read_only)
      fail("WRITE to the read-only %s at byte %zu [pc 0x%lx]", place,
           (size_t)(address - region->low), (ulong)pc);
    if (kRace) check_race(*region, address, size, kind, pc);
    return;
  }
  if (address >= image_low && address < image_high) {
    if (kAsan) check_global(address, size, kind, pc);
    return;
  }
  const uintptr_t zero = (uintptr_t)zero_page();
  if (!is_write && address >= zero && address < zero + (1 << 16))
    return;  // an optional buffer that is not there
  const Region* region = nearest_region(address);
  fail("OUT OF BOUNDS %s of %zu bytes at byte %ld of %s (%zu bytes) [pc 0x%lx]", name_of(kind),
       size, region ? (long)(address - region->low) : 0,
       region ? region->name.c_str() : "no buffer",
       region ? (size_t)(region->high - region->low) : 0, (ulong)pc);
}

}  // namespace emu

using namespace emu;

#define EMU_RETURN_ADDRESS ((uintptr_t)__builtin_return_address(0))
extern "C" {

ulong emu_atomic_read(const volatile void* address, uint size) {
  if (kRace || kAsan)
    check_access((uintptr_t)address, size, Access::kAtomicRead, EMU_RETURN_ADDRESS);
  ulong value = 0;
  memcpy(&value, (const void*)address, size);
  return value;
}
void emu_atomic_write(volatile void* address, uint size, ulong value) {
  if (kRace || kAsan)
    check_access((uintptr_t)address, size, Access::kAtomicWrite, EMU_RETURN_ADDRESS);
  memcpy((void*)address, &value, size);
}

#if defined(EMU_RACE) || defined(EMU_ASAN)
#define EMU_ACCESS(n)                                       \
  void __asan_load##n##_noabort(uintptr_t a) {              \
    check_access(a, n, Access::kRead, EMU_RETURN_ADDRESS);  \
  }                                                         \
  void __asan_store##n##_noabort(uintptr_t a) {             \
    check_access(a, n, Access::kWrite, EMU_RETURN_ADDRESS); \
  }
EMU_ACCESS(1)
EMU_ACCESS(2)
EMU_ACCESS(4)
EMU_ACCESS(8)
EMU_ACCESS(16)
void __asan_loadN_noabort(uintptr_t a, size_t size) {
  check_access(a, size, Access::kRead, EMU_RETURN_ADDRESS);
}
void __asan_storeN_noabort(uintptr_t a, size_t size) {
  check_access(a, size, Access::kWrite, EMU_RETURN_ADDRESS);
}
void* __asan_memcpy(void* to, const void* from, size_t size) {
  check_access((uintptr_t)from, size, Access::kRead, EMU_RETURN_ADDRESS);
  check_access((uintptr_t)to, size, Access::kWrite, EMU_RETURN_ADDRESS);
  return memcpy(to, from, size);
}
void* __asan_memmove(void* to, const void* from, size_t size) {
  check_access((uintptr_t)from, size, Access::kRead, EMU_RETURN_ADDRESS);
  check_access((uintptr_t)to, size, Access::kWrite, EMU_RETURN_ADDRESS);
  return memmove(to, from, size);
}
void* __asan_memset(void* to, int value, size_t size) {
  check_access((uintptr_t)to, size, Access::kWrite, EMU_RETURN_ADDRESS);
  return memset(to, value, size);
}
void __asan_handle_no_return() {}
#endif

}  // extern "C"
