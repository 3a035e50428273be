// The gradients of group_norm_silu from x and the saved mean and rstd, with xhat = (x + embedding - mean) rstd and dz = mask silu'(z) dy:
//   dx = rstd (gain dz - mean(gain dz) - xhat mean(gain dz xhat)), means over the group,
// one pass for dz and its sums over the positions, one for dx. Of these sums the parameters' gradients are made afterwards.
#include "norm_numbers.h"
#include "silu.h"

namespace fm {
namespace FM_ISA {
namespace {

constexpr int64_t kKeptElements = 1 << 16;  // of a unit whose dz stay in the cache between the passes; of a larger one they are made again

// What both passes know of the channels of a unit: d = x - shift = xhat / rstd, z = d factor + term, dx = dz gain + d slope + level.
template <class T>
struct BackwardNumbers {
  ForwardNumbers<T> forward;
  T *gain, *slope, *level;

  BackwardNumbers from(int64_t c) const { return BackwardNumbers{forward.from(c), gain + c, slope + c, level + c}; }
};

// dz, and of each channel sum dz and sum dz d.
template <class S, class Activation>
struct Derivative {
  using T = Compute<S>;
  static constexpr int kAbreast = 1;
  struct Registers {
    Vector<T> shift, factor, term, sum, product;
  };
  Block<const S> x, dy;
  Block<const T> mask;
  Block<T> dz;
  ForwardNumbers<T> numbers;
  T *sums, *products;

  template <class Place>
  FM_METHOD Registers begin(Place place) const {
    return Registers{per_channel(numbers.shift, place), per_channel(numbers.factor, place), per_channel(numbers.term, place), {}, {}};
  }
  template <class How>
  FM_METHOD void step(Registers* r, int, int64_t line, int64_t lane, How how) const {
    Vector<T> d = load(x.at(line, lane), how) - r->shift, g = load(dy.at(line, lane), how);
    if (mask.data) g *= load(mask.at(line, lane), how);
    g = kept<T>(g * Activation::derivative(fused(d, r->factor, r->term)), how);  // what lies beyond a row may be infinite here
    store(dz.at(line, lane), g, how);
    r->sum += g;
    r->product = fused(g, d, r->product);
  }
  template <class Place>
  FM_METHOD void end(const Registers& r, Place place) const {
    store_sum<T>(sums, place, r.sum);
    store_sum<T>(products, place, r.product);
  }
};

// dx, and its sum over each channel.
template <class S>
struct InputGradient {
  using T = Compute<S>;
  static constexpr int kAbreast = 2;
  struct Registers {
    Vector<T> shift, gain, slope, level, sum[kAbreast];
  };
  Block<const S> x;
  Block<const T> dz;
  Block<S> dx;
  BackwardNumbers<T> numbers;
  T* sums;

  template <class Place>
  FM_METHOD Registers begin(Place place) const {
    return Registers{per_channel(numbers.forward.shift, place),
                     per_channel(numbers.gain, place),
                     per_channel(numbers.slope, place),
                     per_channel(numbers.level, place),
                     {}};
  }
  template <class How>
  FM_METHOD void step(Registers* r, int k, int64_t line, int64_t lane, How how) const {
    Vector<T> d = load(x.at(line, lane), how) - r->shift;
    Vector<T> g = fused(load(dz.at(line, lane), how), r->gain, fused(d, r->slope, r->level));
    store(dx.at(line, lane), g, how);
    r->sum[k] += kept<T>(g, how);
  }
  template <class Place>
  FM_METHOD void end(const Registers& r, Place place) const {
    store_sum<T>(sums, place, sum_of_vectors<T>(r.sum));
  }
};

// A unit's sums by channel.
struct ChannelSums {
  double *dz, *product, *dx;  // of dz, dz xhat, dx
};

FM_INLINE ChannelSums sums_of(const NormGradArgs& args, const NormUnit& unit) {
  double* sums = args.sums + 3 * unit.sample * args.norm.shape.channels + unit.channel;
  return ChannelSums{sums, sums + args.norm.shape.channels, sums + 2 * args.norm.shape.channels};
}

template <class T>
FM_INLINE void add_sums(const Piece& piece, const T* values, double* sums) {
  for (int64_t c = 0; c < piece.tile.channels; ++c) sums[c] = static_cast<double>(values[c]) + (piece.tile.position == 0 ? 0.0 : sums[c]);
}

// As the forward pass saved them.
template <class T>
FM_INLINE Statistics group_statistics(const NormArgs& args, const NormUnit& unit, int64_t g) {
  int64_t i = statistics_index(args, unit, g);
  return Statistics{static_cast<double>(static_cast<const T*>(args.mean)[i]), static_cast<double>(static_cast<const T*>(args.rstd)[i])};
}

// Turns the sums of dz d into those of dz xhat, and sets what the second pass needs.
template <class T>
FM_INLINE void set_backward_numbers(const NormArgs& args, const NormUnit& unit, const ChannelSums& sums,
                                    const BackwardNumbers<T>& numbers) {
  int64_t width = unit.channels / unit.groups;
  double count = static_cast<double>(width * args.shape.positions);
  for (int64_t g = 0; g < unit.groups; ++g) {
    double rstd = group_statistics<T>(args, unit, g).rstd;
    double level = 0, slope = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      double gain = affine(args, unit.sample, unit.channel + c).gain;
      sums.product[c] *= rstd;
      level += gain * sums.dz[c];
      slope += gain * sums.product[c];
    }
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      numbers.gain[c] = numbers.forward.factor[c];
      numbers.slope[c] = static_cast<T>(-rstd * rstd * slope / count);
      numbers.level[c] = static_cast<T>(-rstd * level / count);
    }
  }
}

// --- the passes ----------------------------------------------------------------------------------------------------------------------

// Working memory of a thread.
template <class S>
struct Workspace {
  using T = Compute<S>;
  alignas(64) S x[kPieceElements], dy[kPieceElements], dx[kPieceElements];
  alignas(64) T dz[kPieceElements];
  T sums[kMostChannels], products[kMostChannels];
};

template <class S, class Activation>
class Backward {
 public:
  using T = Compute<S>;

  explicit Backward(const NormGradArgs& args)
      : args_(args),
        mask_(args.norm),
        most_(args.norm.shape.channels / args.norm.groups * args.norm.unit_groups),
        numbers_(6 * most_),
        kept_(most_ * args.norm.shape.positions <= kKeptElements ? most_ * args.norm.shape.positions : 0) {}

  void run_unit(const NormUnit& unit) {
    T* n = numbers_.data();
    BackwardNumbers<T> numbers = {{n, n + most_, n + 2 * most_}, n + 3 * most_, n + 4 * most_, n + 5 * most_};
    ChannelSums sums = sums_of(args_, unit);
    for (int64_t g = 0; g < unit.groups; ++g)
      set_forward_numbers<T>(args_.norm, unit, g, group_statistics<T>(args_.norm, unit, g), numbers.forward);
    first_pass(unit, numbers.forward, sums);
    set_backward_numbers<T>(args_.norm, unit, sums, numbers);
    second_pass(unit, numbers, sums);
  }

 private:
  bool keeps() const { return most_ * args_.norm.shape.positions <= kKeptElements; }

  void derivative(const Piece& piece, const Block<const S>& x, const ForwardNumbers<T>& numbers, const Block<T>& dz) {
    Block<const S> dy = input_block<S>(args_.grad_y, piece, 0, space_.dy);
    run<T>(Derivative<S, Activation>{x, dy, mask_.of(piece), dz, numbers, space_.sums, space_.products}, piece);
  }

  void first_pass(const NormUnit& unit, const ForwardNumbers<T>& numbers, const ChannelSums& sums) {
    T* next = kept_.data();
    for_each_piece(args_.norm, unit, [&](const Piece& piece, const View& input) {
      int64_t c = piece.tile.channel - unit.channel;
      Block<const S> x = input_block<S>(input, piece, piece.first, space_.x);
      derivative(piece, x, numbers.from(c), Block<T>{keeps() ? next : space_.dz, piece.width()});
      if (keeps()) next += piece.elements();
      add_sums(piece, space_.sums, sums.dz + c);
      add_sums(piece, space_.products, sums.product + c);
    });
  }

  void second_pass(const NormUnit& unit, const BackwardNumbers<T>& all_numbers, const ChannelSums& sums) {
    T* next = kept_.data();
    for_each_piece(args_.norm, unit, [&](const Piece& piece, const View& input) {
      int64_t c = piece.tile.channel - unit.channel;
      BackwardNumbers<T> numbers = all_numbers.from(c);
      const View& output = piece.tile.channel < args_.norm.first_channels ? args_.grad_x : args_.grad_second;
      Block<const S> x = input_block<S>(input, piece, piece.first, space_.x);
      Block<T> dz = {keeps() ? next : space_.dz, piece.width()};
      if (keeps())
        next += piece.elements();
      else
        derivative(piece, x, numbers.forward, dz);
      Block<S> dx = output_block<S>(output, piece, piece.first, space_.dx);
      run<T>(InputGradient<S>{x, Block<const T>{dz.data, dz.pitch}, dx, numbers, space_.sums}, piece);
      finish_block<S>(output, piece, piece.first, space_.dx);
      add_sums(piece, space_.sums, sums.dx + c);
    });
  }

  const NormGradArgs& args_;
  Mask<T> mask_;
  int64_t most_;
  Scratch<T, 6 * kInlineChannels> numbers_;
  Scratch<T, 1> kept_;
  Workspace<S> space_;
};

template <class S, class Activation>
void backward_units(const NormGradArgs& args, int64_t begin, int64_t end) {
  Backward<S, Activation> backward(args);
  for (int64_t i = begin; i < end; ++i) backward.run_unit(norm_unit(args.norm, i));
}

template <class S>
void backward_units(const NormGradArgs& args, int64_t begin, int64_t end) {
  args.norm.activation ? backward_units<S, Silu>(args, begin, end) : backward_units<S, NoActivation>(args, begin, end);
}

}  // namespace

void group_norm_silu_backward_units(const NormGradArgs& args, int64_t begin, int64_t end) {
  switch (args.norm.x.dtype) {
    case Dtype::float64:
      return backward_units<double>(args, begin, end);
    case Dtype::bfloat16:
      return backward_units<Bfloat16>(args, begin, end);
    case Dtype::float16:
      return backward_units<Float16>(args, begin, end);
    default:
      return backward_units<float>(args, begin, end);
  }
}

}  // namespace FM_ISA
}  // namespace fm
