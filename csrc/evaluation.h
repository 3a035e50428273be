// What the last call of a divergence's evaluation adds to the sums of each sample: the mean over probes, and the variance of that mean
// from the spread of independent groups of consecutive probes.
#pragma once

#include "hd.h"

namespace fm {

struct Evaluation {
  double *dots, *sums;  // [probes, batch], [2, batch]
  int64_t batch, probes, groups;
  double bias, factor;
};

FM_HD double group_mean(const Evaluation& args, int64_t sample, int64_t group) {
  int64_t size = args.probes / args.groups;
  const double* dot = args.dots + group * size * args.batch + sample;
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += dot[i * args.batch];
  return sum / static_cast<double>(size);
}

FM_HD double variance_of_mean(const Evaluation& args, int64_t sample, double mean) {
  double sum = 0;
  for (int64_t group = 0; group < args.groups; ++group) {
    double difference = group_mean(args, sample, group) - mean;
    sum += difference * difference;
  }
  return sum / (static_cast<double>(args.groups - 1) * static_cast<double>(args.groups));
}

FM_HD void finish_evaluation(const Evaluation& args, int64_t sample) {
  double sum = 0;
  for (int64_t group = 0; group < args.groups; ++group) sum += group_mean(args, sample, group);
  double mean = sum / static_cast<double>(args.groups);
  args.sums[sample] += args.bias + args.factor * mean;
  if (args.groups >= 2) args.sums[args.batch + sample] += args.factor * args.factor * variance_of_mean(args, sample, mean);
}

}  // namespace fm
