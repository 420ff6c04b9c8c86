// Fibers: each thread of a block has a stack, and runs until it waits for others.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>

#include "state.h"

constexpr size_t STACK_BYTES = 128 * 1024;
char* stacks;
size_t stack_count;

void (*entry)(void**);  // the kernel
void** entry_arguments;
bool checking;          // a kernel is running, under the checker

void to_scheduler();

void fiber_main() {
    entry(entry_arguments);
    fibers[current].status = Status::done;
    ++done_count;
    to_scheduler();
    abort();  // a finished fiber is never resumed
}

#ifdef __x86_64__
// A switch saves the registers a function must preserve and changes the stack: ten times faster
// than swapcontext, which asks the kernel about signals.
void* scheduler_stack_pointer;
extern "C" void cpu_switch(void** save, void* to);
asm(R"(.text
.globl cpu_switch
.hidden cpu_switch
cpu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret)");

void resume(int i) { cpu_switch(&scheduler_stack_pointer, fibers[i].stack_pointer); }
void to_scheduler() { cpu_switch(&fibers[current].stack_pointer, scheduler_stack_pointer); }

void prepare_stack(int i) {
    // Staggered, so that the tops of all stacks do not fall into one set of the cache.
    uintptr_t top = (uintptr_t)(stacks + (i + 1) * STACK_BYTES) - 64 - (size_t)(i % 64) * 192;
    void** stack = (void**)(top & ~(uintptr_t)15);
    *--stack = nullptr;             // where fiber_main would return to
    *--stack = (void*)fiber_main;   // what the switch returns into
    for (int saved = 0; saved < 6; ++saved) *--stack = nullptr;
    fibers[i].stack_pointer = stack;
}
#else
ucontext_t scheduler_context;
std::vector<ucontext_t> contexts;

void resume(int i) { swapcontext(&scheduler_context, &contexts[i]); }
void to_scheduler() { swapcontext(&contexts[current], &scheduler_context); }

void prepare_stack(int i) {
    contexts.resize(fibers.size());
    getcontext(&contexts[i]);
    contexts[i].uc_stack.ss_sp = stacks + i * STACK_BYTES;
    contexts[i].uc_stack.ss_size = STACK_BYTES;
    contexts[i].uc_link = nullptr;
    makecontext(&contexts[i], fiber_main, 0);
}
#endif

void reserve_stacks(size_t count) {
    if (count <= stack_count) return;
    if (stacks) munmap(stacks, stack_count * STACK_BYTES);
    stack_count = count;
    stacks = (char*)mmap(nullptr, count * STACK_BYTES, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

bool on_a_stack(const char* p) { return p >= stacks && p < stacks + stack_count * STACK_BYTES; }

// Ends the launch from within a fiber.
[[noreturn]] void die() {
    failed = true;
    checking = false;
    fibers[current].status = Status::done;
    to_scheduler();
    abort();
}
