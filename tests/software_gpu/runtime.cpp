// A libcudart for machines without a GPU: the "device" is memory of this process, and its work waits in the queues of its streams until
// something must have it done. So late a device shows what was not waited for: a wrong stream, a copy read too early, memory used again.
// Kernels of fm_fast are those of cuda_emulation.h, torch's are computed by its CPU kernels (torch_ops.py). Captures into graphs, events
// and what neither may meet behave as CUDA's documentation has them.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kDevices = 2, kMultiprocessors = 3;
constexpr size_t kMemory = size_t{8} << 30, kAlignment = 512, kMostPoisoned = size_t{64} << 20;
constexpr int kQuestions = 500;  // after which what is asked for has come
constexpr std::chrono::seconds kPatience{60};
constexpr int kPoison = 0xff;  // not a number in every floating dtype

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
Runtime& runtime() {
  static Runtime& one = *new Runtime;
  return one;
}

thread_local int current = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

cudaError_t fail(cudaError_t error) { return last_error = error; }

cudaError_t outcome() { return runtime().broken == cudaSuccess ? cudaSuccess : fail(runtime().broken); }

bool is_default(cudaStream_t handle) { return handle == nullptr || handle == cudaStreamLegacy || handle == cudaStreamPerThread; }

std::shared_ptr<Stream> stream_of(cudaStream_t handle) {
  Lock lock(runtime().mutex);
  if (is_default(handle)) return runtime().default_stream[current];
  auto found = runtime().streams.find(handle);
  return found == runtime().streams.end() ? nullptr : found->second;
}

std::shared_ptr<Event> event_of(cudaEvent_t handle) {
  Lock lock(runtime().mutex);
  auto found = runtime().events.find(handle);
  return found == runtime().events.end() ? nullptr : found->second;
}

// Takes the next piece below the n-th, once no other thread is at one; false if there is none.
bool take(const std::shared_ptr<Stream>& stream, uint64_t n, Piece* piece) {
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

void run_until(const std::shared_ptr<Stream>& stream, uint64_t n);

// The waits below the n-th piece, before any work of the stream's own: an order that CUDA allows as well.
void run_others_first(const std::shared_ptr<Stream>& stream, uint64_t n) {
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
void run_until(const std::shared_ptr<Stream>& stream, uint64_t n) {
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

void run_all(const std::shared_ptr<Stream>& stream) {
  Lock lock(runtime().mutex);
  const uint64_t n = stream->submitted;
  lock.unlock();
  run_until(stream, n);
}

// The youngest stream first.
void run_device(int device) {
  std::map<unsigned long long, std::shared_ptr<Stream>> found;
  {
    Lock lock(runtime().mutex);
    found[0] = runtime().default_stream[device];
    for (auto& entry : runtime().streams)
      if (entry.second->device == device) found[entry.second->number] = entry.second;
  }
  for (auto entry = found.rbegin(); entry != found.rend(); ++entry) run_all(entry->second);
}

cudaError_t submit(const std::shared_ptr<Stream>& stream, Piece piece) {
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

cudaError_t submit(const std::shared_ptr<Stream>& stream, Work work) { return submit(stream, Piece{std::move(work), nullptr, 0}); }

// What no thread may do while there is a capture, unless it says that it knows: such a call makes the capture invalid.
bool invalidate_captures() {
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

bool invalidate_capture_of(const std::shared_ptr<Stream>& stream) {
  Lock lock(runtime().mutex);
  if (!stream->capture) return false;
  return stream->capture->invalid = true;
}

// Whether all nodes come before these, or are among them.
bool are_last(const std::vector<Node>& nodes, std::vector<size_t> tails) {
  std::set<size_t> seen;
  while (!tails.empty()) {
    size_t node = tails.back();
    tails.pop_back();
    if (seen.insert(node).second) tails.insert(tails.end(), nodes[node].after.begin(), nodes[node].after.end());
  }
  return seen.size() == nodes.size();
}

// Of the nodes that may come next, always the one that was captured last.
std::vector<Node> in_another_order(const std::vector<Node>& nodes) {
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

const Block* block_of(const void* pointer) {
  Lock lock(runtime().mutex);
  auto after = runtime().memory.upper_bound(static_cast<const char*>(pointer));
  if (after == runtime().memory.begin()) return nullptr;
  auto found = std::prev(after);
  return static_cast<const char*>(pointer) < found->first + found->second.size ? &found->second : nullptr;
}

cudaError_t allocate(void** to, size_t size, bool on_host) {
  if (invalidate_captures()) return fail(cudaErrorStreamCaptureUnsupported);
  Lock lock(runtime().mutex);
  size = (size + kAlignment - 1) / kAlignment * kAlignment;
  if (!on_host && runtime().used[current] + size > kMemory) return fail(cudaErrorMemoryAllocation);
  void* memory = size ? aligned_alloc(kAlignment, size) : nullptr;
  if (size && !memory) return fail(cudaErrorMemoryAllocation);
  if (memory && size <= kMostPoisoned) memset(memory, kPoison, size);
  if (memory) runtime().memory[static_cast<char*>(memory)] = {size, current, on_host};
  if (!on_host) runtime().used[current] += size;
  *to = memory;
  return cudaSuccess;
}

cudaError_t release(void* memory) {
  if (!memory) return cudaSuccess;
  if (invalidate_captures()) return fail(cudaErrorStreamCaptureUnsupported);
  const Block* block = block_of(memory);
  if (!block) return fail(cudaErrorInvalidValue);
  const Block freed = *block;
  for (int device = 0; device < kDevices; ++device)
    if (freed.on_host || freed.device == device) run_device(device);
  Lock lock(runtime().mutex);
  if (!runtime().memory.erase(static_cast<char*>(memory))) return fail(cudaErrorInvalidValue);
  if (!freed.on_host) runtime().used[freed.device] -= freed.size;
  free(memory);
  return outcome();
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

bool valid(int device) { return device >= 0 && device < kDevices; }

}  // namespace

// For emulated kernels and for torch_ops.py: a launch. `forget` gets `data` once nothing can run it any more.
EXPORT int software_gpu_submit(void* handle, void (*run)(void*), void (*forget)(void*), void* data) {
  std::shared_ptr<void> kept(data, forget);
  auto stream = stream_of(static_cast<cudaStream_t>(handle));
  if (!stream || stream->device != current) return fail(cudaErrorInvalidResourceHandle);
  return submit(stream, [run, kept] { run(kept.get()); });
}

// A kernel failed: every later call does.
EXPORT void software_gpu_fail() { runtime().broken = cudaErrorAssert; }

// Whether a stream that waits for others has them finished before its own earlier work, or only when it comes to the wait.
EXPORT void software_gpu_others_first(int wanted) { runtime().others_first = wanted != 0; }

// Devices

EXPORT cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}

EXPORT cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}

EXPORT cudaError_t cudaSetDevice(int device) {
  if (!valid(device)) return fail(cudaErrorInvalidDevice);
  current = device;
  return cudaSuccess;
}

EXPORT cudaError_t cudaInitDevice(int device, unsigned, unsigned) { return valid(device) ? cudaSuccess : fail(cudaErrorInvalidDevice); }

EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* to, int device) {
  if (!valid(device)) return fail(cudaErrorInvalidDevice);
  memset(to, 0, sizeof *to);
  snprintf(to->name, sizeof to->name, "software GPU");
  to->uuid.bytes[0] = static_cast<char>(device + 1);
  to->totalGlobalMem = kMemory;
  to->sharedMemPerBlock = 49152;
  to->sharedMemPerBlockOptin = 232448;
  to->sharedMemPerMultiprocessor = 233472;
  to->regsPerBlock = to->regsPerMultiprocessor = 65536;
  to->warpSize = 32;
  to->maxThreadsPerBlock = 1024;
  to->maxThreadsPerMultiProcessor = 2048;
  to->maxThreadsDim[0] = to->maxThreadsDim[1] = 1024;
  to->maxThreadsDim[2] = 64;
  to->maxGridSize[0] = 2147483647;
  to->maxGridSize[1] = to->maxGridSize[2] = 65535;
  to->major = 9;
  to->multiProcessorCount = kMultiprocessors;
  to->unifiedAddressing = 1;
  to->pciBusID = device + 1;
  to->l2CacheSize = 50 << 20;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (!valid(device)) return fail(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = kMultiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 232448;
      break;
    case cudaDevAttrUnifiedAddressing:
      *value = 1;
      break;
    default:
      *value = 0;
  }
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetPCIBusId(char* to, int length, int device) {
  snprintf(to, static_cast<size_t>(length), "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceSynchronize() {
  if (invalidate_captures()) return fail(cudaErrorStreamCaptureUnsupported);
  run_device(current);
  return outcome();
}

EXPORT cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

EXPORT cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

// Errors

EXPORT cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return runtime().broken == cudaSuccess ? error : runtime().broken;
}

EXPORT cudaError_t cudaPeekAtLastError() { return runtime().broken == cudaSuccess ? last_error : runtime().broken; }

EXPORT const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureIsolation:
      return "dependency created on uncaptured work in another stream";
    case cudaErrorStreamCaptureUnjoined:
      return "capture has work that the stream it began on does not wait for";
    case cudaErrorStreamCaptureImplicit:
      return "operation would make the default stream depend on a stream that is capturing";
    case cudaErrorCapturedEvent:
      return "operation not permitted on an event last recorded in a capturing stream";
    case cudaErrorAssert:
      return "a kernel failed on the device: see above";
    case cudaErrorNotReady:
      return "device not ready";
    default:
      break;
  }
  static thread_local char number[64];
  snprintf(number, sizeof number, "error %d of the software GPU", static_cast<int>(error));
  return number;
}

EXPORT const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

// Memory

EXPORT cudaError_t cudaMalloc(void** to, size_t size) { return allocate(to, size, false); }
EXPORT cudaError_t cudaFree(void* memory) { return release(memory); }
EXPORT cudaError_t cudaHostAlloc(void** to, size_t size, unsigned) { return allocate(to, size, true); }
EXPORT cudaError_t cudaMallocHost(void** to, size_t size) { return allocate(to, size, true); }
EXPORT cudaError_t cudaFreeHost(void* memory) { return release(memory); }

EXPORT cudaError_t cudaMemGetInfo(size_t* unused, size_t* total) {
  Lock lock(runtime().mutex);
  *unused = kMemory - runtime().used[current];
  *total = kMemory;
  return cudaSuccess;
}

EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* to, const void* pointer) {
  memset(to, 0, sizeof *to);
  to->device = -1;
  to->type = cudaMemoryTypeUnregistered;
  if (const Block* block = block_of(pointer)) {
    to->type = block->on_host ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    to->device = block->device;
    to->devicePointer = const_cast<void*>(pointer);
    to->hostPointer = block->on_host ? const_cast<void*>(pointer) : nullptr;
  }
  return cudaSuccess;
}

// From memory that is not pinned, CUDA copies what is there at the call; into such memory it waits.
EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t handle) {
  auto stream = stream_of(handle);
  if (!stream) return fail(cudaErrorInvalidResourceHandle);
  Lock lock(runtime().mutex);
  const bool captured = stream->capture != nullptr;
  lock.unlock();
  if (!captured && !block_of(from)) {
    auto bytes = static_cast<const char*>(from);
    auto staged = std::make_shared<std::vector<char>>(bytes, bytes + size);
    return submit(stream, [=] { memcpy(to, staged->data(), size); });
  }
  if (auto error = submit(stream, [=] { memmove(to, from, size); })) return error;
  if (!captured && !block_of(to)) run_all(stream);
  return outcome();
}

EXPORT cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, size, cudaMemcpyDefault, stream);
}

EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
  if (invalidate_captures()) return fail(cudaErrorStreamCaptureUnsupported);
  cudaMemcpyAsync(to, from, size, kind, nullptr);
  run_all(stream_of(nullptr));
  return outcome();
}

EXPORT cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream) {
  return submit(stream_of(stream), [=] { memset(to, value, size); });
}

EXPORT cudaError_t cudaMemset(void* to, int value, size_t size) { return cudaMemsetAsync(to, value, size, nullptr); }

// Streams and events

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* to, unsigned, int) {
  Lock lock(runtime().mutex);
  auto stream = runtime().make_stream(current);
  *to = reinterpret_cast<cudaStream_t>(stream.get());
  runtime().streams[*to] = stream;
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* to, unsigned flags) { return cudaStreamCreateWithPriority(to, flags, 0); }
EXPORT cudaError_t cudaStreamCreate(cudaStream_t* to) { return cudaStreamCreateWithPriority(to, 0, 0); }

EXPORT cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  if (auto stream = stream_of(handle)) run_all(stream);
  Lock lock(runtime().mutex);
  runtime().streams.erase(handle);
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  auto stream = stream_of(handle);
  if (!stream) return fail(cudaErrorInvalidResourceHandle);
  if (invalidate_capture_of(stream) || invalidate_captures()) return fail(cudaErrorStreamCaptureUnsupported);
  run_all(stream);
  return outcome();
}

EXPORT cudaError_t cudaStreamQuery(cudaStream_t handle) {
  auto stream = stream_of(handle);
  if (!stream) return fail(cudaErrorInvalidResourceHandle);
  if (invalidate_capture_of(stream)) return fail(cudaErrorStreamCaptureUnsupported);
  {
    Lock lock(runtime().mutex);
    if (stream->done == stream->submitted) return outcome();
    if (++stream->asked % kQuestions) return fail(cudaErrorNotReady);
  }
  run_all(stream);  // who asks again and again must come to an end
  return outcome();
}

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* to, unsigned) {
  Lock lock(runtime().mutex);
  auto event = std::make_shared<Event>();
  *to = reinterpret_cast<cudaEvent_t>(event.get());
  runtime().events[*to] = event;
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventCreate(cudaEvent_t* to) { return cudaEventCreateWithFlags(to, 0); }

EXPORT cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  auto event = event_of(handle);  // which lives until the lock is given back
  Lock lock(runtime().mutex);
  runtime().events.erase(handle);
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t on) {
  auto event = event_of(handle);
  auto stream = stream_of(on);
  if (!event || !stream) return fail(cudaErrorInvalidResourceHandle);
  std::shared_ptr<Capture> before = event->capture;  // which lives until the lock is given back
  Lock lock(runtime().mutex);
  event->capture = stream->capture;
  event->tails = stream->tails;
  event->asked = 0;
  if (stream->capture) return cudaSuccess;
  auto error = submit(stream, [event] { event->seconds = now(); });
  event->stream = stream;
  event->at = stream->submitted;
  return error;
}

EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) { return cudaEventRecord(event, stream); }

EXPORT cudaError_t cudaEventQuery(cudaEvent_t handle) {
  auto event = event_of(handle);
  if (!event) return fail(cudaErrorInvalidResourceHandle);
  if (invalidate_captures()) return fail(cudaErrorStreamCaptureUnsupported);
  {
    Lock lock(runtime().mutex);
    if (event->capture) return fail(cudaErrorCapturedEvent);
    if (!event->stream || event->stream->done >= event->at) return outcome();
    if (++event->asked < kQuestions) return fail(cudaErrorNotReady);
  }
  run_until(event->stream, event->at);  // who asks again and again must come to an end
  return outcome();
}

EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  auto event = event_of(handle);
  if (!event) return fail(cudaErrorInvalidResourceHandle);
  if (invalidate_captures()) return fail(cudaErrorStreamCaptureUnsupported);
  if (event->capture) return fail(cudaErrorCapturedEvent);
  if (event->stream) run_until(event->stream, event->at);
  return outcome();
}

EXPORT cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  auto first = event_of(from), second = event_of(to);
  if (!first || !second) return fail(cudaErrorInvalidResourceHandle);
  *milliseconds = static_cast<float>(1e3 * (second->seconds - first->seconds));
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t awaited, unsigned) {
  auto event = event_of(awaited);
  auto stream = stream_of(handle);
  if (!event || !stream) return fail(cudaErrorInvalidResourceHandle);
  Lock lock(runtime().mutex);
  if (event->capture) {  // what waits for captured work is captured too
    if (!runtime().captures.count(event->capture.get())) return fail(cudaErrorCapturedEvent);
    if (is_default(handle)) {
      event->capture->invalid = true;
      return fail(cudaErrorStreamCaptureImplicit);
    }
    if (stream->capture && stream->capture != event->capture) return fail(cudaErrorStreamCaptureMerge);
    stream->capture = event->capture;
    stream->tails.insert(stream->tails.end(), event->tails.begin(), event->tails.end());
    return cudaSuccess;
  }
  if (!event->stream) return cudaSuccess;
  if (invalidate_capture_of(stream)) return fail(cudaErrorStreamCaptureIsolation);
  return submit(stream, Piece{nullptr, event->stream, event->at});
}

// Graphs

EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  auto stream = stream_of(handle);
  Lock lock(runtime().mutex);
  if (!stream || is_default(handle) || stream->capture) return fail(cudaErrorStreamCaptureUnsupported);
  stream->capture = std::make_shared<Capture>(Capture{++runtime().captured, mode, std::this_thread::get_id(), {}});
  stream->origin = true;
  stream->tails.clear();
  runtime().captures.insert(stream->capture.get());
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* to) {
  auto stream = stream_of(handle);
  std::shared_ptr<Capture> capture;  // its nodes, which may be Python's, go after the lock
  Lock lock(runtime().mutex);
  *to = nullptr;
  if (!stream || !stream->capture || !stream->origin) return fail(cudaErrorStreamCaptureUnmatched);
  capture = stream->capture;
  const bool joined = are_last(capture->nodes, stream->tails);
  runtime().captures.erase(capture.get());
  stream->origin = false;
  for (auto& entry : runtime().streams)
    if (entry.second->capture == capture) {
      entry.second->capture = nullptr;
      entry.second->tails.clear();
    }
  if (capture->invalid) return fail(cudaErrorStreamCaptureInvalidated);
  if (!joined) return fail(cudaErrorStreamCaptureUnjoined);
  *to = reinterpret_cast<cudaGraph_t>(new Graph{capture->nodes});
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  auto stream = stream_of(handle);
  if (!stream) return fail(cudaErrorInvalidResourceHandle);
  Lock lock(runtime().mutex);
  *status = !stream->capture           ? cudaStreamCaptureStatusNone
            : stream->capture->invalid ? cudaStreamCaptureStatusInvalidated
                                       : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                            cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                            size_t* count) {
  if (auto error = cudaStreamIsCapturing(handle, status)) return error;
  auto stream = stream_of(handle);
  Lock lock(runtime().mutex);
  if (id && stream->capture) *id = stream->capture->id;
  if (graph) *graph = nullptr;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}

EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* to, cudaGraph_t graph, unsigned long long) {
  *to = reinterpret_cast<cudaGraphExec_t>(new Graph{in_another_order(reinterpret_cast<Graph*>(graph)->nodes)});
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphInstantiate(cudaGraphExec_t* to, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(to, graph, flags);
}

EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  auto nodes = reinterpret_cast<Graph*>(exec)->nodes;
  return submit(stream_of(stream), [nodes] {
    for (const Node& node : nodes)
      if (node.work) node.work();
  });
}

EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = reinterpret_cast<Graph*>(graph)->nodes.size();
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete reinterpret_cast<Graph*>(exec);
  return cudaSuccess;
}

// Kernels of torch's libraries: noted, and refused by their names.

EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}

EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT char __cudaInitModule(void**) { return 1; }
EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

EXPORT void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  Lock lock(runtime().mutex);
  runtime().kernels[host] = name;
}

EXPORT unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t) { return 0; }

EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* memory, void* stream) {
  *grid = *block = dim3{1, 1, 1};
  *memory = 0;
  *static_cast<void**>(stream) = nullptr;
  return cudaSuccess;
}

EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}

EXPORT cudaError_t cudaLaunchKernel(const void* host, dim3, dim3, void**, size_t, cudaStream_t) {
  Lock lock(runtime().mutex);
  auto found = runtime().kernels.find(host);
  std::string name = found == runtime().kernels.end() ? "an unknown kernel" : found->second;
  if (name.find("spin_kernel") != std::string::npos) return cudaSuccess;  // torch.cuda._sleep: the device is late anyway
  fprintf(stderr, "software GPU: torch launched %s, which torch_ops.py should have computed\n", name.c_str());
  return fail(cudaErrorInvalidDeviceFunction);
}

EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t memory, cudaStream_t stream) {
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, memory, stream);
}

EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* to, const void*) {
  memset(to, 0, sizeof *to);
  to->maxThreadsPerBlock = 1024;
  to->binaryVersion = to->ptxVersion = 90;
  return cudaSuccess;
}

EXPORT cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

// The driver's functions: those of driver.cpp, and in the place of others one that fails.

static int missing() { return CUDA_ERROR_NOT_SUPPORTED; }

EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** to, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  static void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  void* found = driver ? dlsym(driver, name) : nullptr;
  *to = found ? found : reinterpret_cast<void*>(missing);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

EXPORT cudaError_t cudaGetDriverEntryPoint(const char* name, void** to, unsigned long long flags, cudaDriverEntryPointQueryResult* result) {
  return cudaGetDriverEntryPointByVersion(name, to, CUDART_VERSION, flags, result);
}

EXPORT cudaError_t cudaProfilerStart() { return cudaSuccess; }
EXPORT cudaError_t cudaProfilerStop() { return cudaSuccess; }
