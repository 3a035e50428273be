// The part of the software GPU's libcudart that orders work: streams, events and graphs.
#include "state.h"

using namespace software_gpu;

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

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
