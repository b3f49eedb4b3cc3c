// Threads that share the work of one step.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace nio {

// The caller and `threads - 1` workers take numbered tasks from one counter, so that a thread which loses its core to
// another process delays the others by one task at most. A worker that finds nothing to do spins for some microseconds,
// the time between two products of a step, and then sleeps in the kernel: an idle engine uses no processor, and on a
// machine that does much else nobody spins against the thread it waits for.
class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls work(task) for each task in 0..tasks-1, and returns when all are done.
  template <typename Work>
  void run(int tasks, const Work& work) {
    if (tasks <= 1 || workers_.empty()) {
      for (int task = 0; task < tasks; ++task) work(task);
      return;
    }
    run_erased(tasks, &work, [](const void* erased, int task) { (*static_cast<const Work*>(erased))(task); });
  }

 private:
  using Call = void (*)(const void*, int);

  void run_erased(int tasks, const void* work, Call call);
  void take_tasks();
  void worker();

  std::vector<std::thread> workers_;
  // What a round's tasks are. Read by those who hold a task, which keeps the round from ending; else by nobody.
  const void* work_ = nullptr;
  Call call_ = nullptr;
  int tasks_ = 0;
  bool ending_ = false;
  alignas(64) std::atomic<int> left_{0};  // tasks nobody has taken yet
  alignas(64) std::atomic<int> done_{0};
  alignas(64) std::atomic<uint32_t> round_{0};  // what sleepers wait on
  std::atomic<int> sleepers_{0};
};

}  // namespace nio
