// The asan build: shadow of the fibers' stacks, constant arrays, and the handlers of undefined
// behaviour.
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>

#include "runtime.h"

namespace emu {

#if defined(EMU_ASAN)

namespace {

struct Global {  // as clang lays it out
  uintptr_t begin, size, size_with_redzone;
  const char* name;
  const char* module;
  uintptr_t has_dynamic_initialiser, location, odr_indicator;
};
std::vector<Global>& globals() {
  static std::vector<Global> all;
  return all;
}
// Shadow of the fibers' stacks: a byte for eight. 0: all may be touched; 1 to 7: so many; else
// none.
unsigned char* shadow = nullptr;

unsigned char* stack_shadow(uintptr_t address) {
  if (!shadow)
    shadow = (unsigned char*)mmap(nullptr, EMU_MAX_THREADS * kStackSize / 8, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return shadow + (address - stacks_low()) / 8;
}

// clang passes the address of the shadow in its own mapping: address / 8.
void set_shadow(uintptr_t shadow_address, size_t size, unsigned char value) {
  const uintptr_t address = shadow_address * 8;
  if (in_fiber_stack(address)) memset(stack_shadow(address), value, size);
}

}  // namespace

void check_stack(uintptr_t address, size_t size, Access kind, uintptr_t pc) {
  for (uintptr_t at = address & ~(uintptr_t)7; at < address + size; at += 8) {
    const unsigned char value = *stack_shadow(at);
    if (value == 0) continue;
    const uintptr_t low = std::max(address, at), high = std::min(address + size, at + 8);
    if (value < 8 && high <= at + value) continue;
    fail("OUT OF BOUNDS %s of %zu bytes at %s of the thread [pc 0x%lx]",
         kind == Access::kWrite ? "write" : "read", size,
         value == 0xf8 ? "a variable out of scope" : "the edge of an array", (ulong)pc);
    (void)low;
  }
}

void check_global(uintptr_t address, size_t size, Access kind, uintptr_t pc) {
  for (const Global& global : globals())
    if (address + size > global.begin + global.size &&
        address < global.begin + global.size_with_redzone && address >= global.begin)
      fail("OUT OF BOUNDS %s of %zu bytes at byte %zu of the constant %s (%zu bytes) [pc 0x%lx]",
           kind == Access::kWrite ? "write" : "read", size, (size_t)(address - global.begin),
           global.name, (size_t)global.size, (ulong)pc);
}

void clear_stack_shadow() {
  if (shadow) madvise(shadow, EMU_MAX_THREADS * kStackSize / 8, MADV_DONTNEED);
}

#else

void check_stack(uintptr_t, size_t, Access, uintptr_t) {}
void check_global(uintptr_t, size_t, Access, uintptr_t) {}
void clear_stack_shadow() {}

#endif

}  // namespace emu

#if defined(EMU_ASAN)
using namespace emu;

extern "C" {

void __asan_register_globals(Global* list, size_t count) {
  globals().insert(globals().end(), list, list + count);
}
void __asan_unregister_globals(Global*, size_t) {}
void __asan_poison_stack_memory(uintptr_t address, size_t size) {
  if (in_fiber_stack(address)) memset(stack_shadow(address), 0xf8, (size + 7) / 8);
}
void __asan_unpoison_stack_memory(uintptr_t address, size_t size) {
  if (!in_fiber_stack(address)) return;
  memset(stack_shadow(address), 0, size / 8);
  if (size % 8) *stack_shadow(address + size / 8 * 8) = size % 8;
}
void __asan_alloca_poison(uintptr_t, size_t) {}
void __asan_allocas_unpoison(uintptr_t, uintptr_t) {}
#define EMU_SET_SHADOW(hex)                                      \
  void __asan_set_shadow_##hex(uintptr_t address, size_t size) { \
    set_shadow(address, size, 0x##hex);                          \
  }
EMU_SET_SHADOW(00)
EMU_SET_SHADOW(01)
EMU_SET_SHADOW(02)
EMU_SET_SHADOW(03)
EMU_SET_SHADOW(04)
EMU_SET_SHADOW(05)
EMU_SET_SHADOW(06)
EMU_SET_SHADOW(07)
EMU_SET_SHADOW(f1)
EMU_SET_SHADOW(f2)
EMU_SET_SHADOW(f3)
EMU_SET_SHADOW(f5)
EMU_SET_SHADOW(f8)

// ---- undefined behaviour. Every record of clang starts with a place.
struct UbsanPlace {
  const char* file;
  uint line, column;
};
static void undefined(const UbsanPlace* place, const char* what) {
  if (current_fault && current_fault->launching)
    fail("UNDEFINED: %s at %s:%u", what, place->file, place->line);
}
struct UbsanTypeMismatch {
  UbsanPlace place;
  const void* type;
  unsigned char log_alignment;
  unsigned char check;
};
void __ubsan_handle_type_mismatch_v1(UbsanTypeMismatch* data, uintptr_t pointer) {
  const uintptr_t alignment = (uintptr_t)1 << data->log_alignment;
  if (!pointer)
    undefined(&data->place, "null pointer");
  else if (pointer & (alignment - 1))
    undefined(&data->place, "misaligned address");
  else
    undefined(&data->place, "object is too small for its type");
}
#define EMU_UBSAN1(name, what) \
  void __ubsan_handle_##name(UbsanPlace* place, uintptr_t) { undefined(place, what); }
#define EMU_UBSAN2(name, what) \
  void __ubsan_handle_##name(UbsanPlace* place, uintptr_t, uintptr_t) { undefined(place, what); }
EMU_UBSAN2(add_overflow, "signed integer overflow")
EMU_UBSAN2(sub_overflow, "signed integer overflow")
EMU_UBSAN2(mul_overflow, "signed integer overflow")
EMU_UBSAN1(negate_overflow, "signed integer overflow")
EMU_UBSAN2(divrem_overflow, "division by zero, or one that overflows")
EMU_UBSAN2(shift_out_of_bounds, "shift by a negative amount or by the width and more")
EMU_UBSAN1(out_of_bounds, "index outside an array")
EMU_UBSAN1(vla_bound_not_positive, "array of no elements")
EMU_UBSAN1(load_invalid_value, "value that a bool or enum cannot hold")
EMU_UBSAN1(invalid_builtin, "count of zeros of zero")
EMU_UBSAN1(float_cast_overflow, "conversion of a float that does not fit")
EMU_UBSAN1(nonnull_arg, "null pointer")
EMU_UBSAN1(nonnull_return_v1, "null pointer")
EMU_UBSAN2(pointer_overflow, "pointer overflow")
EMU_UBSAN1(builtin_unreachable, "unreachable code was reached")
EMU_UBSAN1(missing_return, "end of a function without a return")

}  // extern "C"
#endif
