// Threads that share the work of one call.
//
// Work comes in phases of many small items. A thread takes items until none is left, and goes on when all are done.
// No thread waits for one that the OS has descheduled before it took any. (OpenMP's regions do: beside other busy processes
// they took a third of a step.)
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <sched.h>
#include <thread>

inline void pause(int& turns) {
    if (++turns > 4000) sched_yield();
#if defined(__x86_64__)
    else __builtin_ia32_pause();
#endif
}

struct Phase {
    std::atomic<int64_t> next{0}, done{0};

    // Call item(i) for i below `items`, shared out among the threads; returns when all are done. `items` must be the
    // same for all of them, also for one that comes late, when what the phase reads has been overwritten.
    template <class Item>
    void run(int64_t items, Item&& item) {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
            item(i);
            done.fetch_add(1, std::memory_order_release);
        }
        for (int turns = 0; done.load(std::memory_order_acquire) < items;) pause(turns);
    }
};

// Helpers that join a job where they can and leave before it ends. The caller does what they do not.
class Pool {
    std::atomic<uint32_t> number{0};  // of the latest job; changes wake the helpers
    std::atomic<int64_t> inside{0};
    std::atomic<int64_t> places{0};  // for helpers in the present job: it may want fewer than there are
    std::atomic<const std::function<void()>*> job{nullptr};
    std::mutex one_at_a_time;
    int64_t helpers = 0;

    void help() {
        for (uint32_t seen = 0;;) {
            uint32_t now = number.load();
            for (int turns = 0; now == seen && turns < 20000; now = number.load()) pause(turns);  // a step follows soon
            if (now == seen) number.wait(seen);
            seen = number.load();
            inside.fetch_add(1);
            if (auto* work = job.load(); work && places.fetch_sub(1) > 0) (*work)();
            inside.fetch_sub(1);
        }
    }

public:
    void run(int64_t threads, const std::function<void()>& work) {
        std::lock_guard<std::mutex> lock(one_at_a_time);
        for (; helpers < threads - 1; helpers++) std::thread([this] { help(); }).detach();
        if (threads > 1) {
            places.store(threads - 1);
            job.store(&work);
            number.fetch_add(1);
            number.notify_all();
        }
        work();
        job.store(nullptr);
        for (int turns = 0; inside.load() > 0;) pause(turns);
    }
};

inline Pool& pool() {
    static Pool* one = new Pool;  // never destroyed: its threads end with the process
    return *one;
}
