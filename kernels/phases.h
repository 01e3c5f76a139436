// Operations, their phases and tasks, and the threads that run them.
#pragma once
#include <atomic>
#include <mutex>
#include <pthread.h>

#include "vectors.h"

static constexpr long SPINS = 50000;  // polls of the other threads, some 50 us, before a thread sleeps
static constexpr long MAX_THREADS = 256;

// ---- An operation is a struct of its arguments, 8 bytes each, in the order of kernels/cpu.py. It runs in phases, and a
// phase in tasks, which any threads run in any order; a phase starts when all tasks of the one before it are done.
struct Phase {
    long (*tasks)(const void *operation);  // the number of tasks; also allocates the buffers that later phases read
    void (*run)(const void *operation, long task);
};

template <class O, auto TASKS, auto RUN> static constexpr Phase phase() {
    return {[](const void *operation) { return (((const O *)operation)->*TASKS)(); },
            [](const void *operation, long task) { (((const O *)operation)->*RUN)(task); }};
}

// The first arguments of every operation: x [rows, in], from which y [rows, out] is computed.
struct RowOp {
    const bf16 *x;
    long rows, in, out;

    long each_row() const { return rows; }
};

struct Call {
    const Phase *phases;  // the last one is empty
    const void *operation;
};

static std::mutex mutex;  // because the buffers between phases exist once

// Run one call on OpenMP's threads, because PyTorch's operators before and after it run on them, too.
extern "C" void execute(const Call *call) {
    const std::lock_guard lock(mutex);
    for (const Phase *phase = call->phases; phase->tasks; phase++) {
        const long tasks = phase->tasks(call->operation);
#pragma omp parallel for schedule(static) if (tasks > 1)
        for (long i = 0; i < tasks; i++) phase->run(call->operation, i);
    }
}

// A captured step runs on threads of our own. A thread starts with its own share of a phase's tasks, then takes tasks from
// the ends of the other shares. The thread that finishes the last task opens the next phase, so no thread waits for one
// that the system has suspended, unless that one is inside a task. A share is one word, its next task and its end: the
// thread that changes the word owns the task. After a fork there are no workers; the only thread takes all shares.
static struct {
    struct alignas(64) Share { std::atomic<uint64_t> word; } shares[MAX_THREADS];
    std::atomic<uint32_t> turn;            // changes when a phase opens, and at the end
    std::atomic<long> threads, left;       // threads that take part; tasks of the phase that are not done
    std::atomic<bool> finished;
    const Phase *open, *next;  // the running phase, and the one after it
    const void *operation;     // the operation of the open phase
    const Call *call, *end;    // the call of the next phase, and the end of the calls

    // Take a task of a share, the first one as its owner and the last one otherwise. -1 if none is left.
    long claim(std::atomic<uint64_t> &share, bool own) {
        uint64_t word = share;
        while (word >> 32 < uint32_t(word))
            if (share.compare_exchange_weak(word, own ? word + (1ul << 32) : word - 1))
                return own ? word >> 32 : uint32_t(word) - 1;
        return -1;
    }

    // Open the next phase that has several tasks. A phase of one task runs here, because it is not worth a wait.
    void open_next_phase() {
        long tasks = 0;
        while (tasks <= 1 && call < end) {
            open = next++;
            operation = call->operation;
            if (!next->tasks && ++call < end) next = call->phases;
            tasks = open->tasks(operation);
            if (tasks == 1) open->run(operation, 0);
        }
        left = tasks;
        finished = tasks <= 1;
        for (long t = 0; t < threads && tasks > 1; t++) {
            const uint64_t first = t * tasks / threads, last = (t + 1) * tasks / threads;
            shares[t].word = first << 32 | last;
        }
        turn++;
        turn.notify_all();
    }

    // The loop of thread t: thread 0 until the calls have ended, the others for ever.
    void worker_loop(long t) {
        // Read the turn first: `finished` is set before the turn changes, so a thread cannot sleep through it.
        for (uint32_t seen = turn; t > 0 || !finished; seen = turn) {
            long task, done = 0;
            for (long i = 0; i < threads && t < threads; i++)
                for (; (task = claim(shares[(t + i) % threads].word, i == 0)) >= 0; done++) open->run(operation, task);
            if (done > 0 && left.fetch_sub(done) == done) open_next_phase();
            for (long i = 0; i < SPINS && done == 0 && turn == seen; i++) {}
            if (done == 0) turn.wait(seen);
        }
    }
} pool;

extern "C" void replay(const Call *calls, long count, long threads) {
    static long workers = 0;
    const std::lock_guard lock(mutex);
    pool.threads = std::min(threads, MAX_THREADS);
    const auto work = [](void *t) -> void * { return pool.worker_loop(long(t)), nullptr; };
    for (pthread_t thread; workers < pool.threads - 1; workers++) {
        if (pthread_create(&thread, nullptr, work, (void *)(workers + 1)) != 0) break;  // the other threads take its share
        pthread_detach(thread);
    }
    pool.call = calls;
    pool.end = calls + count;
    pool.next = calls->phases;
    pool.open_next_phase();
    pool.worker_loop(0);
}
