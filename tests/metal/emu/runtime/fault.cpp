// Faults: a message, and the way out of a kernel.
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>

#include "runtime.h"

namespace emu {

thread_local Fault* current_fault = nullptr;

namespace {

struct sigaction previous_action;
std::string kernel_prefix;

std::string where() {
  char text[96];
  if (!emu_current) return "";
  snprintf(text, sizeof text, "threadgroup %u, thread %u: ", group.threadgroup,
           emu_current->index_in_threadgroup);
  return text;
}

void on_segv(int signal_number, siginfo_t* info, void* context) {
  Fault* fault = current_fault;
  if (!fault || !fault->launching) {  // not ours
    if (previous_action.sa_flags & SA_SIGINFO) {
      previous_action.sa_sigaction(signal_number, info, context);
    } else if (previous_action.sa_handler == SIG_DFL || previous_action.sa_handler == SIG_IGN) {
      signal(signal_number, SIG_DFL);
      raise(signal_number);
    } else {
      previous_action.sa_handler(signal_number);
    }
    return;
  }
  const uintptr_t address = (uintptr_t)info->si_addr;
  char text[256];
  if (in_stack_guard(address)) {
    snprintf(text, sizeof text, "OUT OF BOUNDS: the thread's stack is full (%zu bytes)",
             kStackSize);
  } else if (const Region* region = nearest_region(address)) {
    snprintf(text, sizeof text, "OUT OF BOUNDS access at byte %ld of %s (%zu bytes)",
             (long)(address - region->low), region->name.c_str(),
             (size_t)(region->high - region->low));
  } else {
    snprintf(text, sizeof text, "OUT OF BOUNDS access at address %p", info->si_addr);
  }
  fault->raised = true;
  fault->message = where() + text;
  siglongjmp(fault->escape, 1);
}

}  // namespace

void install_segv_handler() {
  static const bool installed = [] {
    struct sigaction action = {};
    action.sa_sigaction = on_segv;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &previous_action);
    sigaction(SIGBUS, &action, nullptr);
    return true;
  }();
  (void)installed;
  // The handler must not run on the stack that overflowed.
  static thread_local char* alternate = nullptr;
  stack_t existing;
  if (!alternate && sigaltstack(nullptr, &existing) == 0 && (existing.ss_flags & SS_DISABLE)) {
    constexpr size_t size = 64 << 10;
    alternate =
        (char*)mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    stack_t stack = {};
    stack.ss_sp = alternate;
    stack.ss_size = size;
    sigaltstack(&stack, nullptr);
  }
}

void fail(const char* format, ...) {
  char text[2048];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  Fault* fault = current_fault;
  if (!fault || !fault->launching) {
    fprintf(stderr, "emulator: %s\n", text);
    abort();
  }
  fault->raised = true;
  fault->message = where() + text;
  siglongjmp(fault->escape, 1);
}

}  // namespace emu
