// Choice of the instruction set at run time.
#include "dispatch.h"

#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>

#define FM_EXPORT extern "C" __attribute__((visibility("default")))

namespace fm {
namespace {

bool always() { return true; }

#if defined(__x86_64__)
// Asked of the processor itself: not every compiler that builds this knows the word. Whether the system knows the registers, "avx2" tells.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#endif

#if defined(FM_AVX512_BF16)
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

// Of an instruction set, and attention's of one that may have more.
#define FM_KERNELS(isa, more)                                                                                                         \
  isa::noise_units, isa::schedule_units, isa::path_sample_units, isa::path_loss_units, isa::linear_step_units, isa::step_error_units, \
      isa::step_control_units, isa::parity_units, isa::probe_units, isa::divergence_step_units, isa::adamw_ema_norm_units,            \
      isa::adamw_ema_units, isa::group_norm_silu_units, isa::group_norm_silu_backward_units, isa::conv_weight_grad_units,             \
      isa::conv_weight_grad_sums, isa::conv3x3_weights, isa::conv3x3_units, more::attention_units, more::attention_backward_units,    \
      isa::assignment

// Best first.
const KernelTable kTables[] = {
#if defined(FM_AVX512_BF16)
    {"avx512", has_avx512_bf16, FM_KERNELS(avx512, avx512_bf16)},
#endif
#if defined(__x86_64__)
    {"avx512", has_avx512, FM_KERNELS(avx512, avx512)},
    {"avx2", has_avx2, FM_KERNELS(avx2, avx2)},
#endif
    {"portable", always, FM_KERNELS(portable, portable)},
};
#undef FM_KERNELS

const KernelTable* find(const char* name) {
  for (const KernelTable& table : kTables)
    if ((!name || strcmp(table.name, name) == 0) && table.runs_here()) return &table;
  return nullptr;
}

std::atomic<const KernelTable*> selected{nullptr};

}  // namespace

const KernelTable& kernels() {
  const KernelTable* table = selected.load(std::memory_order_relaxed);
  if (!table) selected.store(table = find(nullptr), std::memory_order_relaxed);
  return *table;
}

}  // namespace fm

// Name of the instruction set in use: "avx512", "avx2" or "portable".
FM_EXPORT const char* fm_fast_cpu_isa(void) { return fm::kernels().name; }

// Use this instruction set from now on. 0, or -1 where the name is unknown or this CPU cannot run it.
FM_EXPORT int fm_fast_cpu_select(const char* name) {
  const fm::KernelTable* table = name ? fm::find(name) : nullptr;
  if (!table) return -1;
  fm::selected.store(table, std::memory_order_relaxed);
  return 0;
}
