/* C ABI of a compiled kernel library (tests/metal/toolchain.py compile_library).
 *
 * A library is one self-contained shared object. Load it with dlopen(path, RTLD_NOW | RTLD_LOCAL),
 * fetch the one exported symbol EMU_API_SYMBOL with dlsym and call it:
 *
 *     const emu_api* api = ((emu_get_api_fn)dlsym(handle, EMU_API_SYMBOL))();
 *     if (api->abi_version != EMU_ABI_VERSION) ...
 *
 * All strings and tables live as long as the library is loaded. launch() may be called from any
 * thread; launches of one library run one after the other. A fault in a kernel is a return value,
 * never an abort.
 */
#ifndef KVQ_EMU_H
#define KVQ_EMU_H

#ifndef MSL_EMU /* kernels are compiled without system headers */
#include <stddef.h>
#include <stdint.h>
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define EMU_ABI_VERSION 1
#define EMU_API_SYMBOL "emu_get_api"

enum { EMU_MAX_BUFFERS = 31, EMU_MAX_THREADS = 1024, EMU_MAX_THREADGROUP_BYTES = 32768 };

typedef enum emu_param_kind {
  EMU_PARAM_BUFFER = 0,      /* device or constant pointer or reference: [[buffer(index)]] */
  EMU_PARAM_THREADGROUP = 1, /* threadgroup pointer: [[threadgroup(index)]] */
} emu_param_kind;

/* A parameter that the host binds; positions in the grid and the like are not listed. */
typedef struct emu_param {
  const char* name;
  int32_t kind;         /* emu_param_kind */
  uint32_t index;       /* argument-table index */
  uint32_t elem_size;   /* sizeof the pointee; 0 for void */
  uint32_t elem_align;  /* alignof the pointee; 1 for void */
  uint8_t is_constant;  /* in the constant address space */
  uint8_t is_read_only; /* constant, or a pointer to const */
  uint8_t is_reference; /* T&: exactly one element is read */
  uint8_t is_optional;  /* [[buffer(n), function_constant(f)]]: exists only where f is true */
} emu_param;

typedef struct emu_kernel {
  const char* name; /* the host_name, or the function's own name */
  const emu_param* params;
  uint32_t n_params;
  uint32_t max_threads; /* max_total_threads_per_threadgroup, else EMU_MAX_THREADS */
  /* Function constants named by the kernel or by what it calls, as indices into
   * emu_api::function_constants. */
  const uint32_t* function_constants;
  uint32_t n_function_constants;
} emu_kernel;

typedef struct emu_function_constant {
  const char* name;
  const char* type; /* MSL spelling: "bool", "uint", "ushort", "float", ... */
  uint32_t index;
  uint32_t size; /* bytes of a value */
} emu_function_constant;

enum {
  /* The kernel works on a copy between guard pages, which is written back afterwards. Without it
   * the kernel works on `data` itself, and a stray access is seen only in the race and asan builds,
   * or by guard pages of the caller. */
  EMU_BUFFER_COPY = 1,
};

typedef struct emu_buffer {
  uint32_t index;
  uint32_t flags;  /* EMU_BUFFER_* */
  void* data;      /* first byte the kernel sees (contents + offset) */
  uint64_t length; /* bytes from `data` to the end of the buffer */
} emu_buffer;

typedef struct emu_threadgroup_memory {
  uint32_t index;
  uint32_t length; /* bytes, a multiple of 16 */
} emu_threadgroup_memory;

typedef struct emu_constant_value {
  uint32_t index;
  uint32_t size; /* must equal the declared size */
  const void* value;
} emu_constant_value;

enum {
  /* `grid` counts threads (dispatchThreads): the last threadgroups of an axis may be smaller. */
  EMU_LAUNCH_GRID_IN_THREADS = 1,
  /* simd_* and quad_* among some lanes of a simdgroup run on those lanes, as Metal defines, instead
     of being a fault. */
  EMU_LAUNCH_PARTIAL_SIMD = 2,
  /* Races between lanes of one simdgroup, which lock-step hides on hardware, are no fault (race
     build). */
  EMU_LAUNCH_ALLOW_LOCKSTEP = 4,
  /* Copied buffers start at a page boundary instead of ending at one: underruns fault instead of
     overruns. */
  EMU_LAUNCH_GUARD_LOW = 8,
};

typedef struct emu_launch {
  const emu_kernel* kernel; /* of this library */
  uint32_t grid[3];
  uint32_t threads_per_threadgroup[3];
  uint32_t flags; /* EMU_LAUNCH_* */
  uint32_t seed;  /* order in which threads run: 0 is ascending, anything else a shuffle */
  const emu_buffer* buffers;
  const emu_threadgroup_memory* threadgroup_memory;
  const emu_constant_value* constants;
  uint32_t n_buffers;
  uint32_t n_threadgroup_memory;
  uint32_t n_constants;
} emu_launch;

typedef enum emu_status {
  EMU_OK = 0,
  EMU_FAULT = 1,   /* the kernel did something wrong; buffers hold what it had written */
  EMU_REFUSED = 2, /* the request itself is wrong; nothing ran */
} emu_status;

typedef struct emu_api {
  uint32_t abi_version;
  const char* mode; /* "fast", "race", "asan" or "fastmath" */
  const emu_kernel* kernels;
  uint32_t n_kernels;
  const emu_function_constant* function_constants;
  uint32_t n_function_constants;
  /* Runs a kernel to its end. On anything but EMU_OK a message is in error (NUL-terminated, cut to
   * error_size). */
  emu_status (*launch)(const emu_launch* request, char* error, size_t error_size);
  /* What pipeline creation would check: every function constant the kernel names has a value of the
   * right size. */
  emu_status (*check_constants)(const emu_kernel* kernel, const emu_constant_value* constants,
                                uint32_t n_constants, char* error, size_t error_size);
  /* Bytes of threadgroup variables declared in the kernel, as far as launches have met them. */
  uint32_t (*static_threadgroup_bytes)(const emu_kernel* kernel);
} emu_api;

typedef const emu_api* (*emu_get_api_fn)(void);

#ifdef __cplusplus
}
#endif
#endif
