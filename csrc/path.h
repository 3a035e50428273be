// Probability paths and objectives: the six numbers (a, s, c1, c0, k, w) of a sample, with x_t = a x1 + s x0 (paper eq. 11) and
// loss = w ||k o - (c1 x1 + c0 x0)||^2 (eq. 14), and the laws from which t is drawn.
#pragma once

#include "normal.h"
#include "philox.h"

namespace fm {

enum PathKind : int { kPathGiven = -1, kPathOT = 0, kPathVP = 1, kPathVE = 2, kPathCosine = 3 };
enum Objective : int { kVelocity = 0, kNoise = 1, kScore = 2, kScoreFlow = 3, kData = 4 };
enum TimeSampler : int { kTimeGiven = -1, kTimeUniform = 0, kTimeStratified = 1, kTimeLogitNormal = 2 };

struct Path {
  int kind;
  double a, b;  // OT: sigma_min, unused. VP: beta_min, beta_max. VE: sigma_min, sigma_max.
};

struct Schedule {
  double alpha, sigma, d_alpha, d_sigma;
};

struct Coefficients {
  double a, s, c1, c0, k, w;
};

// Where they stand in a sample's row of a tensor [B, kColumns].
enum CoefficientColumn : int { kA, kS, kC1, kC0, kK, kW, kColumns };

struct TimeLaw {
  int sampler;
  double mean, std, low, high;
};

// Paper eq. 18, with the linear beta of its appendix E.1.
FM_HD Schedule schedule_vp(double beta_min, double beta_max, double t) {
  double left = 1.0 - t;
  double integral = beta_min * left + 0.5 * (beta_max - beta_min) * left * left;
  double beta = beta_min + (beta_max - beta_min) * left;
  double alpha = exp(-0.5 * integral), sigma = sqrt(-expm1(-integral)), d_alpha = 0.5 * beta * alpha;
  return Schedule{alpha, sigma, d_alpha, -alpha * d_alpha / sigma};
}

// Paper eq. 16.
FM_HD Schedule schedule_ve(double sigma_min, double sigma_max, double t) {
  double growth = log(sigma_max / sigma_min), sigma = sigma_min * exp((1.0 - t) * growth);
  return Schedule{1.0, sigma, 0.0, -sigma * growth};
}

constexpr double kHalfPi = 1.57079632679489661923;

FM_HD void sin_cos_of_quarter_turn(double t, double* sine, double* cosine) {
#if defined(__CUDA_ARCH__)
  sincospi(0.5 * t, sine, cosine);  // needs no table for large angles, and so no memory
#else
  *sine = sin(kHalfPi * t);
  *cosine = sin(kHalfPi * (1.0 - t));  // exact near t = 1
#endif
}

FM_HD Schedule schedule(const Path& path, double t) {
  if (path.kind == kPathVP) return schedule_vp(path.a, path.b, t);
  if (path.kind == kPathVE) return schedule_ve(path.a, path.b, t);
  if (path.kind == kPathCosine) {
    double alpha, sigma;
    sin_cos_of_quarter_turn(t, &alpha, &sigma);
    return Schedule{alpha, sigma, kHalfPi * sigma, -kHalfPi * alpha};
  }
  return Schedule{t, 1.0 - (1.0 - path.a) * t, 1.0, -(1.0 - path.a)};  // OT, paper eq. 20
}

FM_HD Coefficients coefficients(const Path& path, int objective, double t) {
  Schedule p = schedule(path, t);
  if (objective == kVelocity) return Coefficients{p.alpha, p.sigma, p.d_alpha, p.d_sigma, 1.0, 1.0};  // OT: paper eq. 23
  if (objective == kNoise) return Coefficients{p.alpha, p.sigma, 0.0, 1.0, 1.0, 1.0};                 // paper eq. 45
  if (objective == kData) return Coefficients{p.alpha, p.sigma, 1.0, 0.0, 1.0, 1.0};
  // The score's target is -x0 / sigma (paper eq. 43 with the other sign); multiplying by sigma keeps it finite at sigma = 0. ScoreFlow
  // weighs by g^2 / sigma^2 (appendix E.1).
  double weight = objective == kScoreFlow ? 2.0 * (p.d_alpha / p.alpha - p.d_sigma / p.sigma) : 1.0;
  return Coefficients{p.alpha, p.sigma, 0.0, -1.0, p.sigma, weight};
}

// Comparisons are written so that a NaN time stays NaN.
FM_HD double clamp_time(const TimeLaw& law, double t) { return t < law.low ? law.low : (t > law.high ? law.high : t); }

// Stratified times are an integer lattice: any run of consecutive ids is well spread.
FM_HD uint32_t lattice_start(const Stream& stream) { return stream_words(stream, 0, 0).w[0]; }

FM_HD float lattice_time(uint32_t start, uint32_t sample_id) { return uniform_from_word(start + sample_id * kGolden); }

// The random number behind a sample's time: standard normal for the logit-normal law, else uniform.
FM_HD float time_number(const TimeLaw& law, const Stream& stream, uint32_t sample_id) {
  if (law.sampler == kTimeStratified) return lattice_time(lattice_start(stream), sample_id);
  Words words = stream_words(stream, sample_id, 0);
  if (law.sampler != kTimeLogitNormal) return uniform_from_word(words.w[0]);
  float z, unused;
  normal_pair(words.w[0], words.w[1], &z, &unused);
  return z;
}

FM_HD double time_from(const TimeLaw& law, float number) {
  double raw = static_cast<double>(number);
  if (law.sampler == kTimeLogitNormal) raw = 1.0 / (1.0 + exp(-(law.mean + law.std * raw)));
  return law.low + (law.high - law.low) * raw;
}

FM_HD double draw_time(const TimeLaw& law, const Stream& stream, uint32_t sample_id) {
  return time_from(law, time_number(law, stream, sample_id));
}

FM_HD bool flips(const Stream& stream, uint32_t sample_id, double probability) {
  return uniform_from_word(stream_words(stream, sample_id, 0).w[0]) < static_cast<float>(probability);
}

// The data map of integer data x in 0..levels-1 with u in (0, 1] (1/2 without dequantisation); two_over_levels = 2 / levels.
template <class T>
FM_HD T data_map(T x, T u, T two_over_levels) {
  return (x + u) * two_over_levels - T(1);
}

}  // namespace fm
