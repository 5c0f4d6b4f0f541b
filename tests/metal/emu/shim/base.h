// Types, address spaces and the hooks into the runtime: the base of the Metal shim.
//
// One shim serves three back ends, from the same translated source:
//   default        a kernel library for the CPU emulator (calls the emu_* hooks below)
//   MSL_STRICT     address spaces and overloads only, for -fsyntax-only
//   __NVPTX__      PTX
#pragma once
#pragma clang system_header

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned long uintptr_t;
typedef long intptr_t;
typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;
typedef _Float16 half;
typedef __bf16 bfloat;

#define MSL_INLINE static inline __attribute__((always_inline))
#define METAL_FUNC inline __attribute__((always_inline))
#define METAL_INTERNAL inline __attribute__((always_inline))
#define METAL_CONST __attribute__((const))
#define METAL_PURE __attribute__((pure))

#define NAN __builtin_nanf("")
#define INFINITY __builtin_inff()
#define HUGE_VALF __builtin_inff()
#define MAXFLOAT 3.402823466e+38f
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.1920929e-7f
#define FLT_DIG 6
#define FLT_MANT_DIG 24
#define FLT_RADIX 2
#define MAXHALF ((half)65504.0f)
#define HALF_MAX ((half)65504.0f)
#define HALF_MIN ((half)6.103515625e-5f)
#define HALF_EPSILON ((half)9.765625e-4f)
#define HUGE_VALH ((half)__builtin_inff())
#define CHAR_BIT 8
#define CHAR_MAX 127
#define CHAR_MIN (-128)
#define SCHAR_MAX 127
#define SCHAR_MIN (-128)
#define UCHAR_MAX 255
#define SHRT_MAX 32767
#define SHRT_MIN (-32768)
#define USHRT_MAX 65535
#define INT_MAX 2147483647
#define INT_MIN (-INT_MAX - 1)
#define UINT_MAX 4294967295u
#define LONG_MAX 9223372036854775807l
#define LONG_MIN (-LONG_MAX - 1)
#define ULONG_MAX 18446744073709551615ul
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.43429448190325182765f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_PI_4_F 0.78539816339744830962f
#define M_1_PI_F 0.31830988618379067154f
#define M_2_PI_F 0.63661977236758134308f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
#define M_E_H ((half)M_E_F)
#define M_LOG2E_H ((half)M_LOG2E_F)
#define M_LN2_H ((half)M_LN2_F)
#define M_PI_H ((half)M_PI_F)
#define M_SQRT2_H ((half)M_SQRT2_F)
#define assert(...) ((void)0)

// ---- address spaces. The OpenCL ones are kept apart by the front end (overloads, specialisations
// and conversions behave as in Metal) and all map to plain pointers in x86-64 and arm64 code, so
// that sanitizers see every access.
#define MSL_thread
#if defined(__NVPTX__)
#define MSL_device __attribute__((address_space(1)))
#define MSL_constant \
  const __attribute__((opencl_generic))  // a space of its own; loads find the global one
#define MSL_threadgroup __attribute__((address_space(3)))
#define MSL_OTHER_SPACES(M) M(MSL_device) M(__attribute__((opencl_generic))) M(MSL_threadgroup)
#elif defined(MSL_STRICT)
#define MSL_device __attribute__((address_space(1)))
#define MSL_constant const __attribute__((address_space(2)))
#define MSL_threadgroup __attribute__((address_space(3)))
#define MSL_OTHER_SPACES(M) M(MSL_device) M(__attribute__((address_space(2)))) M(MSL_threadgroup)
#else
#define MSL_EMU 1
#define MSL_device __attribute__((opencl_global))
#define MSL_constant const __attribute__((opencl_constant))
#define MSL_threadgroup __attribute__((opencl_local))
#define MSL_OTHER_SPACES(M) M(MSL_device) M(__attribute__((opencl_constant))) M(MSL_threadgroup)
#endif

// ---- hooks of the runtime (emu/runtime)
#ifdef MSL_EMU
struct emu_thread {  // the thread that runs now
  uint position_in_grid[3];
  uint position_in_threadgroup[3];
  uint threadgroup_position[3];
  uint index_in_threadgroup;
};
struct emu_dispatch {               // the launch and threadgroup that run now
  uint threads_per_threadgroup[3];  // of this threadgroup: smaller at the end of a grid counted in
                                    // threads
  uint nominal_threads_per_threadgroup[3];
  uint threadgroups_per_grid[3];
  uint threads_per_grid[3];
  uint simdgroups;
  ulong launch;  // a new number for every launch
};
struct emu_site {  // a place in the source where threads meet
  const char* file;
  uint line;
  uint column;
};
struct emu_threadgroup_variable {
  uint size, align;
  const char* name;
  void* memory;
  ulong launch;  // for which `memory` is valid
};
// Runs once per operation, in the last lane to arrive: slots are 64 bytes apart, `active` has a bit
// per lane.
typedef void (*emu_reduce_fn)(char* slots, uint active, void* result);
// Calls of these must neither be merged nor moved out of the branch they are in.
#define MSL_MEETING __attribute__((convergent, nomerge))
extern "C" {
extern emu_thread* emu_current;
extern emu_dispatch emu_now;
MSL_MEETING const char* emu_simd_exchange(const char* name, const emu_site& site, const void* value,
                                          uint size, emu_reduce_fn reduce, uint* active);
MSL_MEETING void emu_threadgroup_barrier(uint flags, const emu_site& site);
MSL_MEETING void emu_simdgroup_barrier(uint flags, const emu_site& site);
void emu_allocate_threadgroup(emu_threadgroup_variable* variable);
void emu_unset_constant(const char* name);
}
#define MSL_SITE                                                             \
  const char *msl_file = __builtin_FILE(), uint msl_line = __builtin_LINE(), \
             uint msl_column = __builtin_COLUMN()
#define MSL_PASS_SITE msl_file, msl_line, msl_column
#define MSL_MAKE_SITE (emu_site{msl_file, msl_line, msl_column})
#else
#define MSL_SITE uint msl_line = 0
#define MSL_PASS_SITE msl_line
#endif

// ---- what the translation turns declarations into
#define MSL_STRIP(...) __VA_ARGS__
#define MSL_KERNEL_FN static
#define MSL_QUALIFIED_METHOD
#if defined(__NVPTX__)
#define MSL_THREADGROUP(T, name, dims) \
  static __attribute__((address_space(3), loader_uninitialized)) MSL_STRIP T name MSL_STRIP dims
#define MSL_FUNCTION_CONSTANT(T, name, number)                                            \
  extern "C" {                                                                            \
  __attribute__((address_space(4), used)) volatile const T name = {};                     \
  __attribute__((address_space(4), used)) volatile const bool msl_defined_##name = false; \
  }                                                                                       \
  MSL_INLINE T msl_constant_##name() { return name; }
#elif defined(MSL_STRICT)
#define MSL_THREADGROUP(T, name, dims) \
  static __attribute__((address_space(3), loader_uninitialized)) MSL_STRIP T name MSL_STRIP dims
#define MSL_FUNCTION_CONSTANT(T, name, number)           \
  extern const __attribute__((address_space(2))) T name; \
  extern const bool msl_defined_##name;                  \
  T msl_constant_##name();
#else
#define MSL_THREADGROUP(T, name, dims)                                       \
  typedef MSL_threadgroup MSL_STRIP T msl_type_##name MSL_STRIP dims;        \
  static emu_threadgroup_variable msl_variable_##name = {                    \
      sizeof(msl_type_##name), alignof(msl_type_##name), #name, nullptr, 0}; \
  if (msl_variable_##name.launch != emu_now.launch)                          \
    emu_allocate_threadgroup(&msl_variable_##name);                          \
  msl_type_##name& name = *(msl_type_##name*)msl_variable_##name.memory
#define MSL_FUNCTION_CONSTANT(T, name, number)                               \
  static T msl_value_##name;                                                 \
  static bool msl_defined_##name;                                            \
  MSL_INLINE T msl_constant_##name() {                                       \
    if (__builtin_expect(!msl_defined_##name, 0)) emu_unset_constant(#name); \
    return msl_value_##name;                                                 \
  }
#endif
