// A libcudart for machines without a GPU: the "device" is memory of this process, and its work waits in the queues of its streams until
// something must have it done. So late a device shows what was not waited for: a wrong stream, a copy read too early, memory used again.
// Kernels of fm_fast are those of cuda_emulation.h, torch's are computed by its CPU kernels (torch_ops.py). Captures into graphs, events
// and what neither may meet behave as CUDA's documentation has them.
#include <dlfcn.h>

#include <string>

#include "state.h"

using namespace software_gpu;

namespace {

constexpr int kMultiprocessors = 3;
constexpr size_t kMemory = size_t{8} << 30, kAlignment = 512, kMostPoisoned = size_t{64} << 20;
constexpr int kPoison = 0xff;  // not a number in every floating dtype

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

// The driver's functions: those of driver_stub.c, and in the place of others one that fails.

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
