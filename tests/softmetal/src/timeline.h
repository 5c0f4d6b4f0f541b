// The device's time line: one worker thread that runs committed command buffers in order.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>

namespace softmetal {

class Timeline {
 public:
  static Timeline& instance();

  /// Queues work. In lazy mode it is held back until release().
  void submit(std::function<void()> work);
  /// Lets work that was held back run; called by whoever is going to wait.
  void release();

 private:
  Timeline();
  [[noreturn]] void run();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> ready_;
  std::deque<std::function<void()>> held_;
};

}  // namespace softmetal
