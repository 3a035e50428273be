// What the software GPU knows and in which order it works: streams and their queues, events, captures, memory.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace software_gpu {

constexpr int kDevices = 2;
constexpr int kQuestions = 500;  // after which what is asked for has come
constexpr std::chrono::seconds kPatience{60};

using Work = std::function<void()>;
using Lock = std::unique_lock<std::recursive_mutex>;

struct Node {
  Work work;
  std::vector<size_t> after;  // nodes of the same graph
};

struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  std::vector<Node> nodes;
  bool invalid = false;
};

struct Stream;

// Of a queue: work, or the wait for another stream's first pieces.
struct Piece {
  Work work;
  std::shared_ptr<Stream> awaited;
  uint64_t until = 0;
};

struct Stream {
  int device;
  unsigned long long number;
  std::deque<Piece> queue;
  uint64_t submitted = 0, done = 0;
  std::thread::id runner;  // that runs a piece of it, if one does
  int asked = 0;
  std::shared_ptr<Capture> capture;
  bool origin = false;        // of its capture
  std::vector<size_t> tails;  // the nodes of the capture that its next one comes after
};

struct Event {
  std::shared_ptr<Stream> stream;
  uint64_t at = 0;
  std::shared_ptr<Capture> capture;
  std::vector<size_t> tails;
  int asked = 0;
  double seconds = 0.0;
};

struct Graph {
  std::vector<Node> nodes;
};

struct Block {
  size_t size;
  int device;
  bool on_host;
};

struct Runtime {
  std::recursive_mutex mutex;
  std::condition_variable_any advanced;
  std::map<const char*, Block> memory;
  size_t used[kDevices] = {};
  std::map<void*, std::shared_ptr<Stream>> streams;
  std::map<void*, std::shared_ptr<Event>> events;
  std::shared_ptr<Stream> default_stream[kDevices];
  std::set<Capture*> captures;
  std::unordered_map<const void*, const char*> kernels;  // of torch
  unsigned long long captured = 0, created = 0;
  cudaError_t broken = cudaSuccess;  // what a kernel did, after which a device is of no more use
  bool others_first = false;         // see software_gpu_others_first

  Runtime() {
    const char* order = getenv("SOFTWARE_GPU_ORDER");
    others_first = order && !strcmp(order, "others-first");
    for (int i = 0; i < kDevices; ++i) default_stream[i] = make_stream(i);
  }

  std::shared_ptr<Stream> make_stream(int device) {
    auto stream = std::make_shared<Stream>();
    stream->device = device;
    stream->number = ++created;
    return stream;
  }
};

// Never destroyed: torch's libraries ask for things while the process ends.
inline Runtime& runtime() {
  static Runtime& one = *new Runtime;
  return one;
}

inline thread_local int current = 0;
inline thread_local cudaError_t last_error = cudaSuccess;
inline thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

inline cudaError_t fail(cudaError_t error) { return last_error = error; }

inline cudaError_t outcome() { return runtime().broken == cudaSuccess ? cudaSuccess : fail(runtime().broken); }

inline bool is_default(cudaStream_t handle) { return handle == nullptr || handle == cudaStreamLegacy || handle == cudaStreamPerThread; }

inline std::shared_ptr<Stream> stream_of(cudaStream_t handle) {
  Lock lock(runtime().mutex);
  if (is_default(handle)) return runtime().default_stream[current];
  auto found = runtime().streams.find(handle);
  return found == runtime().streams.end() ? nullptr : found->second;
}

inline std::shared_ptr<Event> event_of(cudaEvent_t handle) {
  Lock lock(runtime().mutex);
  auto found = runtime().events.find(handle);
  return found == runtime().events.end() ? nullptr : found->second;
}

// Takes the next piece below the n-th, once no other thread is at one; false if there is none.
inline bool take(const std::shared_ptr<Stream>& stream, uint64_t n, Piece* piece) {
  Lock lock(runtime().mutex);
  const auto me = std::this_thread::get_id();
  while (stream->runner != std::thread::id() && stream->runner != me)
    if (runtime().advanced.wait_for(lock, kPatience) == std::cv_status::timeout) {
      fprintf(stderr, "software GPU: two threads wait for each other\n");
      abort();
    }
  if (stream->runner == me || stream->done >= n || stream->queue.empty()) return false;
  *piece = std::move(stream->queue.front());
  stream->queue.pop_front();
  stream->runner = me;
  return true;
}

inline void run_until(const std::shared_ptr<Stream>& stream, uint64_t n);

// The waits below the n-th piece, before any work of the stream's own: an order that CUDA allows as well.
inline void run_others_first(const std::shared_ptr<Stream>& stream, uint64_t n) {
  std::vector<Piece> waits;
  {
    Lock lock(runtime().mutex);
    uint64_t position = stream->done;
    for (const Piece& piece : stream->queue)
      if (position++ < n && piece.awaited) waits.push_back(piece);
  }
  for (const Piece& wait : waits) run_until(wait.awaited, wait.until);
}

// The work of a stream up to its n-th piece. The lock is not held meanwhile: the work may be Python's.
inline void run_until(const std::shared_ptr<Stream>& stream, uint64_t n) {
  if (runtime().others_first) run_others_first(stream, n);
  Piece piece;
  while (take(stream, n, &piece)) {
    if (piece.awaited) run_until(piece.awaited, piece.until);
    if (piece.work && runtime().broken == cudaSuccess) piece.work();
    piece = Piece();
    Lock lock(runtime().mutex);
    ++stream->done;
    stream->runner = std::thread::id();
    runtime().advanced.notify_all();
  }
}

inline void run_all(const std::shared_ptr<Stream>& stream) {
  Lock lock(runtime().mutex);
  const uint64_t n = stream->submitted;
  lock.unlock();
  run_until(stream, n);
}

// The youngest stream first.
inline void run_device(int device) {
  std::map<unsigned long long, std::shared_ptr<Stream>> found;
  {
    Lock lock(runtime().mutex);
    found[0] = runtime().default_stream[device];
    for (auto& entry : runtime().streams)
      if (entry.second->device == device) found[entry.second->number] = entry.second;
  }
  for (auto entry = found.rbegin(); entry != found.rend(); ++entry) run_all(entry->second);
}

inline cudaError_t submit(const std::shared_ptr<Stream>& stream, Piece piece) {
  if (!stream) return fail(cudaErrorInvalidResourceHandle);
  Lock lock(runtime().mutex);
  if (stream->capture) {
    stream->capture->nodes.push_back({std::move(piece.work), stream->tails});
    stream->tails = {stream->capture->nodes.size() - 1};
    return cudaSuccess;
  }
  stream->queue.push_back(std::move(piece));
  ++stream->submitted;
  return outcome();
}

inline cudaError_t submit(const std::shared_ptr<Stream>& stream, Work work) { return submit(stream, Piece{std::move(work), nullptr, 0}); }

// What no thread may do while there is a capture, unless it says that it knows: such a call makes the capture invalid.
inline bool invalidate_captures() {
  Lock lock(runtime().mutex);
  bool any = false;
  for (Capture* capture : runtime().captures) {
    bool own = capture->thread == std::this_thread::get_id() && capture->mode != cudaStreamCaptureModeRelaxed;
    bool others = capture->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
    if (thread_mode == cudaStreamCaptureModeRelaxed || !(own || others)) continue;
    capture->invalid = any = true;
  }
  return any;
}

inline bool invalidate_capture_of(const std::shared_ptr<Stream>& stream) {
  Lock lock(runtime().mutex);
  if (!stream->capture) return false;
  return stream->capture->invalid = true;
}

// Whether all nodes come before these, or are among them.
inline bool are_last(const std::vector<Node>& nodes, std::vector<size_t> tails) {
  std::set<size_t> seen;
  while (!tails.empty()) {
    size_t node = tails.back();
    tails.pop_back();
    if (seen.insert(node).second) tails.insert(tails.end(), nodes[node].after.begin(), nodes[node].after.end());
  }
  return seen.size() == nodes.size();
}

// Of the nodes that may come next, always the one that was captured last.
inline std::vector<Node> in_another_order(const std::vector<Node>& nodes) {
  std::vector<std::vector<size_t>> followers(nodes.size());
  std::vector<size_t> missing(nodes.size());
  std::set<size_t> ready;
  std::vector<Node> ordered;
  for (size_t i = 0; i < nodes.size(); ++i) {
    for (size_t before : nodes[i].after) followers[before].push_back(i);
    if ((missing[i] = nodes[i].after.size()) == 0) ready.insert(i);
  }
  while (!ready.empty()) {
    const size_t next = *ready.rbegin();
    ready.erase(next);
    ordered.push_back(nodes[next]);
    for (size_t follower : followers[next])
      if (--missing[follower] == 0) ready.insert(follower);
  }
  return ordered;
}

inline const Block* block_of(const void* pointer) {
  Lock lock(runtime().mutex);
  auto after = runtime().memory.upper_bound(static_cast<const char*>(pointer));
  if (after == runtime().memory.begin()) return nullptr;
  auto found = std::prev(after);
  return static_cast<const char*>(pointer) < found->first + found->second.size ? &found->second : nullptr;
}

}  // namespace software_gpu
