#include "pool.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

namespace nio {
namespace {

constexpr int kSpins = 600;  // of about 60 ns

void futex(std::atomic<uint32_t>* word, int operation, uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), operation, value, nullptr, nullptr, 0);
}

}  // namespace

Pool::Pool(int threads) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { worker(); });
}

Pool::~Pool() {
  ending_ = true;
  round_.fetch_add(1);
  futex(&round_, FUTEX_WAKE_PRIVATE, INT_MAX);
  for (auto& thread : workers_) thread.join();
}

void Pool::run_erased(int tasks, const void* work, Call call) {
  work_ = work;
  call_ = call;
  tasks_ = tasks;
  done_.store(0, std::memory_order_relaxed);
  left_.store(tasks, std::memory_order_release);
  round_.fetch_add(1);
  if (sleepers_.load() > 0) futex(&round_, FUTEX_WAKE_PRIVATE, INT_MAX);
  take_tasks();
  for (int spin = 0; done_.load(std::memory_order_acquire) < tasks; ++spin) {
    if (spin < kSpins) {
      _mm_pause();
    } else {
      sched_yield();  // whoever holds the last task has lost its core, perhaps to us
    }
  }
}

void Pool::take_tasks() {
  int left = left_.load(std::memory_order_acquire);
  while (left > 0) {
    if (!left_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel)) continue;
    call_(work_, tasks_ - left);
    done_.fetch_add(1, std::memory_order_release);
    left = left_.load(std::memory_order_acquire);
  }
}

void Pool::worker() {
  uint32_t seen = 0;
  while (true) {
    for (int spin = 0; round_.load(std::memory_order_acquire) == seen; ++spin) {
      if (spin < kSpins) {
        _mm_pause();
        continue;
      }
      sleepers_.fetch_add(1);
      futex(&round_, FUTEX_WAIT_PRIVATE, seen);
      sleepers_.fetch_sub(1);
    }
    seen = round_.load(std::memory_order_acquire);
    if (ending_) return;
    take_tasks();
  }
}

}  // namespace nio
