// A block of threads for GroupPlanner, made of threads of the processor. Its barriers order no more than a GPU's do, so
// that a race on a GPU is one here, where ThreadSanitizer finds it.
#pragma once

#include <pthread.h>

#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "cuda/draw_plan.cuh"

namespace layerdrop_fast {

class Barrier {
 public:
  explicit Barrier(int threads) { pthread_barrier_init(&barrier_, nullptr, static_cast<unsigned>(threads)); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

// What the threads of a block share.
struct Team {
  explicit Team(int threads) : size(threads), all(threads), flags(static_cast<size_t>(threads)) {
    for (int i = 0; i < threads / kWarp; ++i) warps.push_back(std::make_unique<Barrier>(kWarp));
  }

  int size;
  Barrier all;
  std::vector<std::unique_ptr<Barrier>> warps;
  std::vector<uint32_t> flags;
  Shared shared = {};
};

class HostBlock {
 public:
  HostBlock(Team& team, int thread) : team_(team), thread_(thread) {}
  int thread() const { return thread_; }
  int size() const { return team_.size; }
  void sync() { team_.all.wait(); }
  Shared& shared() { return team_.shared; }

  uint32_t ballot(bool flag) {
    const int warp = thread_ / kWarp;
    team_.flags[static_cast<size_t>(thread_)] = flag;
    team_.warps[static_cast<size_t>(warp)]->wait();
    uint32_t bits = 0;
    for (int i = 0; i < kWarp; ++i) bits |= team_.flags[static_cast<size_t>(warp * kWarp + i)] << i;
    team_.warps[static_cast<size_t>(warp)]->wait();  // all have read
    return bits;
  }

 private:
  Team& team_;
  int thread_;
};

// Calls body(block) in `threads` threads at once.
template <typename Body>
void run_block(int threads, const Body& body) {
  Team team(threads);
  std::vector<std::thread> running;
  for (int thread = 0; thread < threads; ++thread) {
    running.emplace_back([&team, &body, thread] {
      HostBlock block(team, thread);
      body(block);
    });
  }
  for (std::thread& each : running) each.join();
}

}  // namespace layerdrop_fast
