// What group_norm_silu and its backward make of the statistics of a group: the numbers of its channels.
#pragma once

#include "norm_parameters.h"
#include "norm_piece.h"

namespace fm {
namespace FM_ISA {

// Of one group.
struct Statistics {
  double mean, rstd;
};

// Where those of group g of the unit stand in the tensors of means and of rstds.
FM_INLINE int64_t statistics_index(const NormArgs& args, const NormUnit& unit, int64_t g) {
  return unit.sample * args.groups + unit.group + g;
}

// z = (x - shift) factor + term. The difference comes first: with x far from zero, or all alike, it is exact where products are not.
template <class T>
struct ForwardNumbers {
  T *shift, *factor, *term;

  ForwardNumbers from(int64_t c) const { return ForwardNumbers{shift + c, factor + c, term + c}; }
};

// Of the channels of group g of the unit.
template <class T>
FM_INLINE void set_forward_numbers(const NormArgs& args, const NormUnit& unit, int64_t g, const Statistics& group,
                                   const ForwardNumbers<T>& numbers) {
  int64_t width = unit.channels / unit.groups;
  for (int64_t c = g * width; c < (g + 1) * width; ++c) {
    Affine a = affine(args, unit.sample, unit.channel + c);
    numbers.shift[c] = static_cast<T>(group.mean - parameter(args.embedding, unit.sample, unit.channel + c, 0.0));
    numbers.factor[c] = static_cast<T>(group.rstd * a.gain);
    numbers.term[c] = static_cast<T>(a.offset);
  }
}

}  // namespace FM_ISA
}  // namespace fm
