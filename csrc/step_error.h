// One element of step_error, for every backend.
#pragma once

#include "hd.h"

namespace fm {

// Of an error to what is tolerated in a step from y to end.
template <class T>
FM_HD T square_of_ratio(T error, T y, T end, T rtol, T atol) {
  T ratio = error / multiply_add(rtol, larger(magnitude(y), magnitude(end)), atol);
  return ratio * ratio;
}

}  // namespace fm
