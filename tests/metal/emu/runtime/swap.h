// emu_swap(void** save, void* to): leaves the running stack, continues on another. Saves what a
// call must keep.
#pragma once

#if defined(__x86_64__)
asm(R"(
.text
.globl emu_swap
.hidden emu_swap
.type emu_swap,@function
emu_swap:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_swap, .-emu_swap
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl emu_swap
.hidden emu_swap
.type emu_swap,%function
emu_swap:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emu_swap, .-emu_swap
)");
#else
#error "the fiber swap is written for x86-64 and arm64"
#endif
extern "C" void emu_swap(void** save, void* to);

// The stack of a fiber that has not run: emu_swap to it enters `entry`.
inline void* emu_fresh_stack(char* top, void (*entry)()) {
  void** sp = (void**)((uintptr_t)top & ~(uintptr_t)15);
#if defined(__x86_64__)
  *--sp = nullptr;       // a return address that is never used, and the alignment of a call
  *--sp = (void*)entry;  // popped by ret
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
#else
  sp -= 20;
  for (int i = 0; i < 20; ++i) sp[i] = nullptr;
  sp[11] = (void*)entry;  // x30
#endif
  return sp;
}
