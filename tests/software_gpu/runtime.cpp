// A libcudart for machines without a GPU: the "device" is memory of this process, and its work waits in the queues of its streams until
// something must have it done. So late a device shows what was not waited for: a wrong stream, a copy read too early, memory used again.
// Kernels of fm_fast are those of cuda_emulation.h, torch's are computed by its CPU kernels (torch_ops.py). Captures into graphs, events
// and what neither may meet behave as CUDA's documentation has them.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <chrono>
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
constexpr int kPoison = 0xff;  // not a number in every floating dtype

using Work = std::function<void()>;
using Lock = std::lock_guard<std::recursive_mutex>;

struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  std::vector<Work> nodes;
  bool invalid = false;
};

struct Stream {
  int device;
  std::deque<Work> waiting;
  uint64_t submitted = 0, done = 0;
  std::shared_ptr<Capture> capture;
  bool origin = false;  // of its capture
};

struct Event {
  std::shared_ptr<Stream> stream;
  uint64_t at = 0;
  std::shared_ptr<Capture> capture;
  int asked = 0;
  double seconds = 0.0;
};

struct Graph {
  std::vector<Work> nodes;
};

struct Block {
  size_t size;
  int device;
  bool on_host;
};

struct Runtime {
  std::recursive_mutex mutex;
  std::map<const char*, Block> memory;
  size_t used[kDevices] = {};
  std::map<void*, std::shared_ptr<Stream>> streams;
  std::shared_ptr<Stream> usual[kDevices];
  std::set<Capture*> captures;
  std::unordered_map<const void*, const char*> kernels;  // of torch
  unsigned long long captured = 0;

  Runtime() {
    for (int i = 0; i < kDevices; ++i) {
      usual[i] = std::make_shared<Stream>();
      usual[i]->device = i;
    }
  }
};

// Never destroyed: torch's libraries ask for things while the process ends.
Runtime& runtime() {
  static Runtime& one = *new Runtime;
  return one;
}

thread_local int current = 0;
thread_local cudaError_t last = cudaSuccess;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

cudaError_t fail(cudaError_t error) { return last = error; }

std::shared_ptr<Stream> stream_of(cudaStream_t handle) {
  if (handle == nullptr || handle == cudaStreamLegacy || handle == cudaStreamPerThread) return runtime().usual[current];
  auto found = runtime().streams.find(handle);
  return found == runtime().streams.end() ? nullptr : found->second;
}

// The work of a stream up to its n-th piece. The lock is not held meanwhile: the work may be Python's.
void finish(const std::shared_ptr<Stream>& stream, uint64_t n) {
  for (;;) {
    Work next;
    {
      Lock lock(runtime().mutex);
      if (stream->done >= n || stream->waiting.empty()) return;
      next = std::move(stream->waiting.front());
      stream->waiting.pop_front();
      ++stream->done;
    }
    next();
  }
}

void finish(const std::shared_ptr<Stream>& stream) { finish(stream, stream->submitted); }

void finish_device() {
  std::vector<std::shared_ptr<Stream>> streams = {runtime().usual[current]};
  {
    Lock lock(runtime().mutex);
    for (auto& entry : runtime().streams)
      if (entry.second->device == current) streams.push_back(entry.second);
  }
  for (auto stream = streams.rbegin(); stream != streams.rend(); ++stream) finish(*stream);
}

cudaError_t submit(const std::shared_ptr<Stream>& stream, Work work) {
  if (!stream) return fail(cudaErrorInvalidResourceHandle);
  Lock lock(runtime().mutex);
  if (stream->capture) {
    stream->capture->nodes.push_back(std::move(work));
    return cudaSuccess;
  }
  stream->waiting.push_back(std::move(work));
  ++stream->submitted;
  return cudaSuccess;
}

// What no thread may do while there is a capture, unless it says that it knows: such a call makes the capture invalid.
bool breaks_captures() {
  Lock lock(runtime().mutex);
  bool broken = false;
  for (Capture* capture : runtime().captures) {
    bool own = capture->thread == std::this_thread::get_id() && capture->mode != cudaStreamCaptureModeRelaxed;
    bool any = capture->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
    if (thread_mode == cudaStreamCaptureModeRelaxed || !(own || any)) continue;
    capture->invalid = broken = true;
  }
  return broken;
}

bool breaks_its_capture(const std::shared_ptr<Stream>& stream) {
  if (!stream->capture) return false;
  return stream->capture->invalid = true;
}

const Block* block_of(const void* pointer) {
  Lock lock(runtime().mutex);
  auto after = runtime().memory.upper_bound(static_cast<const char*>(pointer));
  if (after == runtime().memory.begin()) return nullptr;
  auto found = std::prev(after);
  return static_cast<const char*>(pointer) < found->first + found->second.size ? &found->second : nullptr;
}

cudaError_t allocate(void** to, size_t size, bool on_host) {
  if (breaks_captures()) return fail(cudaErrorStreamCaptureUnsupported);
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
  if (breaks_captures()) return fail(cudaErrorStreamCaptureUnsupported);
  finish_device();
  Lock lock(runtime().mutex);
  auto found = runtime().memory.find(static_cast<char*>(memory));
  if (found == runtime().memory.end()) return fail(cudaErrorInvalidValue);
  if (!found->second.on_host) runtime().used[found->second.device] -= found->second.size;
  runtime().memory.erase(found);
  free(memory);
  return cudaSuccess;
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

bool valid(int device) { return device >= 0 && device < kDevices; }

}  // namespace

// For emulated kernels and for torch_ops.py: work of a stream. `forget` gets `data` once nothing can run it any more.
EXPORT int software_gpu_submit(void* stream, void (*run)(void*), void (*forget)(void*), void* data) {
  std::shared_ptr<void> kept(data, forget);
  return submit(stream_of(static_cast<cudaStream_t>(stream)), [run, kept] { run(kept.get()); });
}

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

EXPORT cudaError_t cudaInitDevice(int device, unsigned, unsigned) { return cudaSetDevice(device); }

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
  if (breaks_captures()) return fail(cudaErrorStreamCaptureUnsupported);
  finish_device();
  return cudaSuccess;
}

EXPORT cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

EXPORT cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

// Errors

EXPORT cudaError_t cudaGetLastError() {
  cudaError_t error = last;
  last = cudaSuccess;
  return error;
}

EXPORT cudaError_t cudaPeekAtLastError() { return last; }

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
  if (stream->capture) return submit(stream, [=] { memmove(to, from, size); });
  if (!block_of(from)) {
    auto bytes = static_cast<const char*>(from);
    auto staged = std::make_shared<std::vector<char>>(bytes, bytes + size);
    return submit(stream, [=] { memcpy(to, staged->data(), size); });
  }
  submit(stream, [=] { memmove(to, from, size); });
  if (!block_of(to)) finish(stream);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, size, cudaMemcpyDefault, stream);
}

EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
  if (breaks_captures()) return fail(cudaErrorStreamCaptureUnsupported);
  cudaMemcpyAsync(to, from, size, kind, nullptr);
  finish(stream_of(nullptr));
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream) {
  return submit(stream_of(stream), [=] { memset(to, value, size); });
}

EXPORT cudaError_t cudaMemset(void* to, int value, size_t size) { return cudaMemsetAsync(to, value, size, nullptr); }

// Streams and events

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* to, unsigned, int) {
  auto stream = std::make_shared<Stream>();
  stream->device = current;
  Lock lock(runtime().mutex);
  *to = reinterpret_cast<cudaStream_t>(stream.get());
  runtime().streams[*to] = stream;
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* to, unsigned flags) { return cudaStreamCreateWithPriority(to, flags, 0); }
EXPORT cudaError_t cudaStreamCreate(cudaStream_t* to) { return cudaStreamCreateWithPriority(to, 0, 0); }

EXPORT cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  if (auto stream = stream_of(handle)) finish(stream);
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
  if (breaks_its_capture(stream) || breaks_captures()) return fail(cudaErrorStreamCaptureUnsupported);
  finish(stream);
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamQuery(cudaStream_t handle) {
  auto stream = stream_of(handle);
  if (!stream) return fail(cudaErrorInvalidResourceHandle);
  if (breaks_its_capture(stream)) return fail(cudaErrorStreamCaptureUnsupported);
  if (stream->done == stream->submitted) return cudaSuccess;
  finish(stream, stream->done + 1);  // who asks again and again must come to an end
  return fail(cudaErrorNotReady);
}

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* to, unsigned) {
  *to = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventCreate(cudaEvent_t* to) { return cudaEventCreateWithFlags(to, 0); }

EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
  (void)event;  // queued work may still write its time
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t on) {
  auto event = reinterpret_cast<Event*>(handle);
  auto stream = stream_of(on);
  if (!stream) return fail(cudaErrorInvalidResourceHandle);
  event->capture = stream->capture;
  if (stream->capture) return cudaSuccess;
  submit(stream, [event] { event->seconds = now(); });
  event->stream = stream;
  event->at = stream->submitted;
  event->asked = 0;
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) { return cudaEventRecord(event, stream); }

EXPORT cudaError_t cudaEventQuery(cudaEvent_t handle) {
  auto event = reinterpret_cast<Event*>(handle);
  if (breaks_captures() || event->capture) return fail(cudaErrorStreamCaptureUnsupported);
  if (!event->stream || event->stream->done >= event->at) return cudaSuccess;
  if (event->asked++) {  // who asks again and again must come to an end
    finish(event->stream, event->at);
    return cudaSuccess;
  }
  return fail(cudaErrorNotReady);
}

EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  auto event = reinterpret_cast<Event*>(handle);
  if (breaks_captures() || event->capture) return fail(cudaErrorStreamCaptureUnsupported);
  if (event->stream) finish(event->stream, event->at);
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  double seconds = reinterpret_cast<Event*>(to)->seconds - reinterpret_cast<Event*>(from)->seconds;
  *milliseconds = static_cast<float>(1e3 * seconds);
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t awaited, unsigned) {
  auto event = reinterpret_cast<Event*>(awaited);
  auto stream = stream_of(handle);
  if (!stream) return fail(cudaErrorInvalidResourceHandle);
  Lock lock(runtime().mutex);
  if (event->capture) {  // what waits for captured work is captured too
    if (!runtime().captures.count(event->capture.get())) return fail(cudaErrorStreamCaptureIsolation);
    if (stream->capture && stream->capture != event->capture) return fail(cudaErrorStreamCaptureMerge);
    stream->capture = event->capture;
    return cudaSuccess;
  }
  if (!event->stream || event->stream->done >= event->at) return cudaSuccess;
  if (breaks_its_capture(stream)) return fail(cudaErrorStreamCaptureIsolation);
  return submit(stream, [from = event->stream, at = event->at] { finish(from, at); });
}

// Graphs

EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  auto stream = stream_of(handle);
  Lock lock(runtime().mutex);
  if (!stream || stream == runtime().usual[current] || stream->capture) return fail(cudaErrorStreamCaptureUnsupported);
  stream->capture = std::make_shared<Capture>(Capture{++runtime().captured, mode, std::this_thread::get_id(), {}});
  stream->origin = true;
  runtime().captures.insert(stream->capture.get());
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* to) {
  auto stream = stream_of(handle);
  Lock lock(runtime().mutex);
  *to = nullptr;
  if (!stream || !stream->capture || !stream->origin) return fail(cudaErrorStreamCaptureUnmatched);
  auto capture = stream->capture;
  runtime().captures.erase(capture.get());
  stream->origin = false;
  stream->capture = nullptr;
  for (auto& entry : runtime().streams)
    if (entry.second->capture == capture) entry.second->capture = nullptr;
  if (capture->invalid) return fail(cudaErrorStreamCaptureInvalidated);
  *to = reinterpret_cast<cudaGraph_t>(new Graph{capture->nodes});
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  auto stream = stream_of(handle);
  if (!stream) return fail(cudaErrorInvalidResourceHandle);
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
  *to = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphInstantiate(cudaGraphExec_t* to, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(to, graph, flags);
}

EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  auto nodes = reinterpret_cast<Graph*>(exec)->nodes;
  return submit(stream_of(stream), [nodes] {
    for (const Work& node : nodes) node();
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
