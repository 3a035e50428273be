// y = mask silu(GroupNorm([x, second] + embedding) (1 + scale) + shift), sample by sample: one pass over a unit's input for its statistics,
// one for the result, which finds the input in the cache.
#include "norm_numbers.h"
#include "silu.h"

namespace fm {
namespace FM_ISA {
namespace {

template <class T>
using Channels = Scratch<T, kInlineChannels>;

// --- statistics ----------------------------------------------------------------------------------------------------------------------

// sum x of each channel.
template <class S>
struct Sums {
  using T = Compute<S>;
  static constexpr int kAbreast = 4;
  struct Registers {
    Vector<T> sum[kAbreast];
  };
  Block<const S> x;
  T* sums;

  template <class Place>
  FM_METHOD Registers begin(Place) const {
    return Registers{};
  }
  template <class How>
  FM_METHOD void step(Registers* r, int k, int64_t line, int64_t lane, How how) const {
    r->sum[k] += load(x.at(line, lane), how);
  }
  template <class Place>
  FM_METHOD void end(const Registers& r, Place place) const {
    store_sum<T>(sums, place, sum_of_vectors<T>(r.sum));
  }
};

// sum d and sum d^2 of each channel with d = x - shift.
template <class S>
struct Deviations {
  using T = Compute<S>;
  static constexpr int kAbreast = 4;
  struct Registers {
    Vector<T> shift, sum[kAbreast], square[kAbreast];
  };
  Block<const S> x;
  const T* shift;
  T *sums, *squares;

  template <class Place>
  FM_METHOD Registers begin(Place place) const {
    Registers r = {};
    r.shift = per_channel(shift, place);
    return r;
  }
  template <class How>
  FM_METHOD void step(Registers* r, int k, int64_t line, int64_t lane, How how) const {
    Vector<T> d = kept<T>(load(x.at(line, lane), how) - r->shift, how);
    r->sum[k] += d;
    r->square[k] = fused(d, d, r->square[k]);
  }
  template <class Place>
  FM_METHOD void end(const Registers& r, Place place) const {
    store_sum<T>(sums, place, sum_of_vectors<T>(r.sum));
    store_sum<T>(squares, place, sum_of_vectors<T>(r.square));
  }
};

// Mean and sum of squared deviations of the positions so far.
struct Moments {
  double mean, spread;
};

// Adds `count` numbers with the sums of d and d^2, d = number - shift, to `before` numbers (Chan, Golub & LeVeque 1983).
FM_INLINE Moments merged(const Moments& m, double before, double count, double shift, double sum, double square) {
  double mean = shift + sum / count, spread = square - sum * sum / count, distance = mean - m.mean, all = before + count;
  return Moments{m.mean + distance * (count / all), m.spread + spread + distance * distance * (before * count / all)};
}

// The numbers of a piece are shifted by the mean of those before it. Were that far off, the positions so far and the piece would differ in
// mean, and that difference is part of the variance: so what float32 loses by the shift stays within a few roundings of the result.
template <class S>
FM_INLINE void add_piece(const Piece& piece, Block<const S> x, Moments* moments) {
  using T = Compute<S>;
  T shift[kMostChannels], sums[kMostChannels], squares[kMostChannels];
  int64_t channels = piece.tile.channels;
  double before = static_cast<double>(piece.tile.position), count = static_cast<double>(piece.tile.positions);
  if (piece.tile.position == 0) run<T>(Sums<S>{x, sums}, piece);
  for (int64_t c = 0; c < channels; ++c)
    shift[c] = static_cast<T>(piece.tile.position == 0 ? static_cast<double>(sums[c]) / count : moments[c].mean);
  run<T>(Deviations<S>{x, shift, sums, squares}, piece);
  for (int64_t c = 0; c < channels; ++c) {
    const Moments& start = piece.tile.position == 0 ? Moments{0, 0} : moments[c];
    moments[c] = merged(start, before, count, static_cast<double>(shift[c]), static_cast<double>(sums[c]), static_cast<double>(squares[c]));
  }
}

// Of one group, from the moments of its channels, to which the embedding is added here.
FM_INLINE Statistics group_statistics(const NormArgs& args, int64_t sample, int64_t channel, int64_t channels, const Moments* moments) {
  double positions = static_cast<double>(args.shape.positions), count = static_cast<double>(channels), mean = 0, spread = 0;
  for (int64_t c = 0; c < channels; ++c) mean += moments[c].mean + parameter(args.embedding, sample, channel + c, 0.0);
  mean /= count;
  for (int64_t c = 0; c < channels; ++c) {
    double distance = moments[c].mean + parameter(args.embedding, sample, channel + c, 0.0) - mean;
    spread += moments[c].spread + positions * distance * distance;
  }
  return Statistics{mean, 1.0 / sqrt(spread / (positions * count) + args.eps)};
}

// --- the result ----------------------------------------------------------------------------------------------------------------------

template <class S, class Activation>
struct Apply {
  using T = Compute<S>;
  static constexpr int kAbreast = 2;
  struct Registers {
    Vector<T> shift, factor, term;
  };
  Block<const S> x;
  Block<const T> mask;
  Block<S> y;
  ForwardNumbers<T> numbers;

  template <class Place>
  FM_METHOD Registers begin(Place place) const {
    return Registers{per_channel(numbers.shift, place), per_channel(numbers.factor, place), per_channel(numbers.term, place)};
  }
  template <class How>
  FM_METHOD void step(Registers* r, int, int64_t line, int64_t lane, How how) const {
    Vector<T> value = Activation::value(fused(load(x.at(line, lane), how) - r->shift, r->factor, r->term));
    if (mask.data) value *= load(mask.at(line, lane), how);
    store(y.at(line, lane), value, how);
  }
  template <class Place>
  FM_METHOD void end(const Registers&, Place) const {}
};

template <class T>
FM_INLINE void set_numbers(const NormArgs& args, const NormUnit& unit, const Moments* moments, const ForwardNumbers<T>& numbers) {
  int64_t width = unit.channels / unit.groups;
  T *means = static_cast<T*>(args.mean), *rstds = static_cast<T*>(args.rstd);
  for (int64_t g = 0; g < unit.groups; ++g) {
    Statistics group = group_statistics(args, unit.sample, unit.channel + g * width, width, moments + g * width);
    means[statistics_index(args, unit, g)] = static_cast<T>(group.mean);
    rstds[statistics_index(args, unit, g)] = static_cast<T>(group.rstd);
    set_forward_numbers<T>(args, unit, g, group, numbers);
  }
}

template <class S, class Activation>
void norm_units(const NormArgs& args, int64_t begin, int64_t end) {
  using T = Compute<S>;
  int64_t most = args.shape.channels / args.groups * args.unit_groups;
  Channels<Moments> moments(most);
  Channels<T> shift(most), factor(most), term(most);
  Mask<T> mask(args);
  alignas(64) S buffer[kPieceElements], result[kPieceElements];
  for (int64_t i = begin; i < end; ++i) {
    NormUnit unit = norm_unit(args, i);
    for_each_piece(args, unit, [&](const Piece& piece, const View& input) {
      add_piece<S>(piece, input_block<S>(input, piece, piece.first, buffer), moments.data() + piece.tile.channel - unit.channel);
    });
    ForwardNumbers<T> numbers = {shift.data(), factor.data(), term.data()};
    set_numbers<T>(args, unit, moments.data(), numbers);
    for_each_piece(args, unit, [&](const Piece& piece, const View& input) {
      int64_t c = piece.tile.channel - unit.channel;
      Block<const S> x = input_block<S>(input, piece, piece.first, buffer);
      Block<S> y = output_block<S>(args.y, piece, 0, result);
      run<T>(Apply<S, Activation>{x, mask.of(piece), y, numbers.from(c)}, piece);
      finish_block<S>(args.y, piece, 0, result);
    });
  }
}

template <class S>
void norm_units(const NormArgs& args, int64_t begin, int64_t end) {
  args.activation ? norm_units<S, Silu>(args, begin, end) : norm_units<S, NoActivation>(args, begin, end);
}

}  // namespace

void group_norm_silu_units(const NormArgs& args, int64_t begin, int64_t end) {
  switch (args.x.dtype) {
    case Dtype::float64:
      return norm_units<double>(args, begin, end);
    case Dtype::bfloat16:
      return norm_units<Bfloat16>(args, begin, end);
    case Dtype::float16:
      return norm_units<Float16>(args, begin, end);
    default:
      return norm_units<float>(args, begin, end);
  }
}

}  // namespace FM_ISA
}  // namespace fm
