// Runs a launch: blocks one after another, the threads of a block in turn until all have returned.
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "waiting.h"

constexpr size_t LARGEST_DYNAMIC_SHARED = 227 * 1024;
enum Order { FORWARD, BACKWARD, RANDOM };

char *shared_begin, *shared_end;  // static shared memory
std::vector<char> dynamic_storage;
char* dynamic_shared;

extern "C" void* cpu_dynamic_shared() { return dynamic_shared; }

// ---- traps of -fsanitize=undefined and faults of a kernel become errors of its launch -------------
// So does a kernel that does not end: a timer asks for SIGVTALRM.
const int SIGNALS[] = {SIGILL, SIGSEGV, SIGBUS, SIGFPE, SIGVTALRM};
constexpr int SIGNAL_COUNT = sizeof SIGNALS / sizeof *SIGNALS;
struct sigaction handlers_before[SIGNAL_COUNT];

void set_handlers(bool ours);

void on_signal(int number, siginfo_t* info, void* context) {
    if (!in_kernel) {
        // Not ours: let it happen again, to whoever had the handler. The timer comes again anyway.
        if (number != SIGVTALRM) set_handlers(false);
        return;
    }
    in_kernel = false;
    void* pc = info->si_addr;
#ifdef __x86_64__
    pc = (void*)(((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP] + 1);
#endif
    error("%s; pc=%p " WHERE,
          number == SIGILL      ? "UNDEFINED BEHAVIOUR: overflow, misalignment, index, cast or shift"
          : number == SIGFPE    ? "UNDEFINED BEHAVIOUR: integer division by zero"
          : number == SIGVTALRM ? "RUNAWAY: the launch does not end"
                                : "MEMORY FAULT",
          pc, WHERE_ARGUMENTS);
    die();  // leaves the handler by switching stacks, which SA_NODEFER allows
}

void set_handlers(bool ours) {
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    for (int i = 0; i < SIGNAL_COUNT; ++i)
        if (ours) sigaction(SIGNALS[i], &action, &handlers_before[i]);
        else sigaction(SIGNALS[i], &handlers_before[i], nullptr);
}

// Sends SIGVTALRM to this thread once it has had so much of a processor, and a hundred times a
// second from then on, until it finds a kernel running. On a busy machine it comes no sooner.
struct Timer {
    timer_t timer;
    explicit Timer(double seconds) {
        struct sigevent event = {};
        event.sigev_notify = SIGEV_THREAD_ID;
        event.sigev_signo = SIGVTALRM;
        event._sigev_un._tid = (int)syscall(SYS_gettid);
        struct itimerspec when = {};
        when.it_value.tv_sec = (time_t)seconds;
        when.it_value.tv_nsec = (long)((seconds - (double)when.it_value.tv_sec) * 1e9) + 1;
        when.it_interval.tv_nsec = 10'000'000;
        timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer);
        timer_settime(timer, 0, &when, nullptr);
    }
    ~Timer() { timer_delete(timer); }
};

// ---- orders -------------------------------------------------------------------------------------
uint64_t random_state;
size_t random_below(size_t n) {  // xorshift
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state % n;
}

std::vector<int> sequence(size_t n, int order) {
    std::vector<int> numbers(n);
    for (size_t i = 0; i < n; ++i) numbers[i] = (int)(order == BACKWARD ? n - 1 - i : i);
    return numbers;
}

void shuffle(std::vector<int>& numbers) {
    for (size_t i = numbers.size(); i > 1; --i) std::swap(numbers[i - 1], numbers[random_below(i)]);
}

// ---- one block ------------------------------------------------------------------------------------
void start_block() {
    ++block_number;
    epoch = 1;
    done_count = waiting_count = 0;
    // All ones: NaN as a float, and an absurd index.
    memset(shared_begin, 0xff, shared_end - shared_begin);
    std::fill(dynamic_storage.begin(), dynamic_storage.end(), (char)0xff);
    for (auto& warp : gatherings)
        for (auto& gathering : warp) gathering.mask = 0;
    for (size_t i = 0; i < fibers.size(); ++i) {
        Fiber& fiber = fibers[i];
        const unsigned n = (unsigned)i;
        fiber.status = Status::ready;
        fiber.index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y};
        memset(fiber.clock, 0, sizeof fiber.clock);
        fiber.clock[i % WARP] = 1;
        prepare_stack((int)i);
    }
}

void run_block(std::vector<int>& threads, int order, bool check) {
    start_block();
    while ((size_t)done_count < fibers.size() && !failed) {
        bool progress = false;
        if (order == RANDOM) shuffle(threads);
        for (size_t k = 0; k < threads.size() && !failed; ++k) {
            if (fibers[threads[k]].status != Status::ready) continue;
            progress = true;
            current = threads[k];
            threadIdx = fibers[current].index;
            checking = check;
            in_kernel = true;
            resume(current);
            in_kernel = checking = false;
            if (all_at_barrier()) release_barrier();  // the last of them has returned
        }
        if (!progress && !failed) {
            error("DEADLOCK in block (%u,%u,%u): %d threads wait at __syncthreads, %d have "
                  "returned, the others wait for lanes of their warp", blockIdx.x, blockIdx.y,
                  blockIdx.z, waiting_count, done_count);
            failed = true;
        }
    }
}

// All blocks of the grid or, where there are any, the chosen ones (three numbers each).
void run_blocks(size_t threads, int order, bool check, const unsigned* chosen, int chosen_count) {
    block_number = 0;
    std::vector<int> turns = sequence(threads, order);
    for (int b = 0; b < chosen_count && !failed; ++b) {
        blockIdx = {chosen[3 * b], chosen[3 * b + 1], chosen[3 * b + 2]};
        run_block(turns, order, check);
    }
    std::vector<int> blocks;
    if (!chosen_count) blocks = sequence((size_t)gridDim.x * gridDim.y * gridDim.z, order);
    if (order == RANDOM) shuffle(blocks);
    for (size_t b = 0; b < blocks.size() && !failed; ++b) {
        const unsigned n = (unsigned)blocks[b];
        blockIdx = {n % gridDim.x, n / gridDim.x % gridDim.y, n / gridDim.x / gridDim.y};
        run_block(turns, order, check);
    }
}

// ---- the launch: returns the number of errors, their text in `report` --------------------------------
struct Buffer {
    void* begin;
    size_t size;
    int argument;
};

extern "C" int cpu_launch(void (*kernel)(void**), void (*shared_range)(char**, char**),
                          void** arguments, const unsigned* grid, const unsigned* block,
                          size_t dynamic_bytes, int order, uint64_t seed, int check,
                          const Buffer* buffers, int buffer_count, const unsigned* chosen,
                          int chosen_count, void* begin_of_image, void* end_of_image,
                          double seconds, char* report, int report_size) {
    messages.clear();
    reported.clear();
    error_count = 0;
    failed = false;
    entry = kernel;
    entry_arguments = arguments;
    random_state = seed * 2654435761u + 88172645463325252ull;
    image_begin = (uintptr_t)begin_of_image;
    image_end = (uintptr_t)end_of_image;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    const size_t threads = (size_t)block[0] * block[1] * block[2];
    if (threads < 1 || threads > 1024 || dynamic_bytes > LARGEST_DYNAMIC_SHARED ||
        grid[1] > 65535 || grid[2] > 65535) {
        snprintf(report, report_size, "BAD LAUNCH: more than a device allows\n");
        return 1;
    }
    fibers.resize(threads);
    gatherings.resize((threads + WARP - 1) / WARP);
    reserve_stacks(threads);
    shared_range(&shared_begin, &shared_end);
    dynamic_storage.assign(dynamic_bytes + 16, 0);
    dynamic_shared = (char*)(((uintptr_t)dynamic_storage.data() + 15) & ~(uintptr_t)15);
    if (check) {
        for (int i = 0; i < buffer_count; ++i)
            add_region(buffers[i].begin, buffers[i].size, buffers[i].argument);
        add_region(shared_begin, shared_end - shared_begin, -1);
        add_region(dynamic_shared, dynamic_bytes, -2);
    }
    set_handlers(true);
    {
        const Timer timer(seconds);
        run_blocks(threads, order, check, chosen, chosen_count);
    }
    set_handlers(false);
    regions.clear();
    last_region = nullptr;
    snprintf(report, report_size, "%s", messages.c_str());
    return error_count;
}
