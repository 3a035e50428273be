// probe and divergence_step, from torch's arguments to their kernels.
#include "dispatch.h"
#include "ops.h"
#include "scratch.h"
#include "unbox.h"

namespace fm {
namespace {

using abi::Arguments;
using abi::Tensor;

constexpr int64_t kMostIndices = 1 << 24;     // an index has 24 bits of the counter
constexpr int64_t kParityGrain = 64;          // blocks of a thread
constexpr int64_t kEvaluationGrain = 1024;    // sums of a thread
constexpr int64_t kInlineParities = 1 << 12;  // words that a call may keep on its stack

using Parities = Scratch<uint32_t, kInlineParities>;

enum ProbeKind : int { kSigns = 0, kNormals = 1 };

// Which probes: the arguments that both ops share.
struct ProbeInputs {
  Tensor key, codes, rows;
  int64_t index, first, share;
};

// `probes` is [K, B, ...]: probes first, first + 1, ...
ProbeArgs probe_args(const Tensor& probes, const ProbeInputs& in, int64_t block_points) {
  Tensor entry = probes.entry();
  ProbeArgs args = {};
  args.shape = shape_of(entry);
  args.view = float_view(entry, entry);
  args.probe_stride = probes.strides()[0];
  args.key = key_of(in.key, args.shape.batch);
  args.share = whole(in.share, 1, INT64_MAX, "share");
  args.first = whole(in.first, 0, INT64_MAX - probes.sizes()[0], "first");
  args.index = whole(in.index, 0, kMostIndices - 1, "index");
  whole(args.index + (args.first + probes.sizes()[0] - 1) / args.share, 0, kMostIndices - 1, "index + probes / share");
  args.tiling = plan(&args.shape, {&args.view}, block_points);
  return args;
}

struct Structure {
  int64_t channels, points, probes, blocks;  // blocks of all probes
};

Structure structure_of(const Tensor& probes, const ProbeInputs& in) {
  Shape shape = shape_of(probes.entry());
  int64_t count = in.codes.numel() == 0 ? 0 : probes.sizes()[0];
  return Structure{shape.channels, shape.points, count, count * shape.channels * divide_up(shape.points, 128)};
}

// The parities of structured probes, which are the same for all samples.
const uint32_t* fill_parities(const Structure& structure, const ProbeInputs& in, Parities* parities) {
  if (structure.probes == 0) return nullptr;
  const int64_t *codes = dense_integers(in.codes), *rows = dense_integers(in.rows);
  if (in.codes.numel() != structure.channels * structure.points) in.codes.fail("expected one code an element of a sample");
  if (in.rows.numel() < in.first + structure.probes) in.rows.fail("expected one row a probe");
  ParityArgs args = {codes, rows + in.first, structure.channels, structure.points, parities->data()};
  run_units(kernels().parity, args, structure.blocks, kParityGrain);
  return args.parities;
}

// What the last call of an evaluation adds to the sums of each sample.
struct EvaluationArgs {
  double *dots, *sums;  // [probes, batch], [2, batch]
  int64_t batch, probes, groups;
  double bias, factor;
};

EvaluationArgs evaluation_args(const Tensor& sums, const Tensor& dots, int64_t batch, int64_t groups) {
  if (dots.dim() != 2 || dots.sizes()[1] != batch) dots.fail("expected [probes, B]");
  int64_t probes = dots.sizes()[0];
  if (groups < 1 || probes % groups) throw std::runtime_error("fm_fast: argument groups: expected a divisor of the number of probes");
  return EvaluationArgs{dense_doubles(dots, probes * batch), dense_doubles(sums, 2 * batch), batch, probes, groups, 0, 0};
}

double group_mean(const EvaluationArgs& args, int64_t sample, int64_t group) {
  int64_t size = args.probes / args.groups;
  const double* dot = args.dots + group * size * args.batch + sample;
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += dot[i * args.batch];
  return sum / static_cast<double>(size);
}

double variance_of_mean(const EvaluationArgs& args, int64_t sample, double mean) {
  double sum = 0;
  for (int64_t group = 0; group < args.groups; ++group) {
    double difference = group_mean(args, sample, group) - mean;
    sum += difference * difference;
  }
  return sum / (static_cast<double>(args.groups - 1) * static_cast<double>(args.groups));
}

void finish_evaluation(const EvaluationArgs& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    double sum = 0;
    for (int64_t group = 0; group < args.groups; ++group) sum += group_mean(args, b, group);
    double mean = sum / static_cast<double>(args.groups);
    args.sums[b] += args.bias + args.factor * mean;
    if (args.groups >= 2) args.sums[args.batch + b] += args.factor * args.factor * variance_of_mean(args, b, mean);
  }
}

// dots of the probes of this call, from the sums of tiles.
void write_dots(DivergenceArgs* args, int64_t probes, double* dots) {
  int64_t samples = probes * args->probes.shape.batch, tiles = tiles_per_sample(args->probes.tiling);
  int64_t units = probes * args->probes.tiling.units;
  Scratch<double, kInlineSums> partial(tiles > 1 ? samples * tiles : 0);
  args->partial = tiles > 1 ? partial.data() : dots;
  run_units(kernels().divergence_step, *args, units, kGrain);
  if (tiles == 1) return;
  for (int64_t i = 0; i < samples; ++i) dots[i] = sum_in_order(args->partial + i * tiles, tiles);
}

}  // namespace

void probe(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, "TTTTiii");
  Tensor out = in.tensor("out");
  ProbeInputs inputs = {in.tensor("key"), in.tensor("codes"), in.tensor("rows"), in.integer(), in.integer(), in.integer()};
  ProbeArgs args = probe_args(out, inputs, 128);
  Structure structure = structure_of(out, inputs);
  Parities parities(4 * structure.blocks);
  args.parities = fill_parities(structure, inputs, &parities);
  run_units(kernels().probe, args, out.sizes()[0] * args.tiling.units, kGrain);
}

void divergence_step(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, "TTTTTTiiiiiff");
  Tensor sums = in.tensor("sums"), dots = in.tensor("dots"), g = in.tensor("g");
  Tensor key = in.tensor("key"), codes = in.tensor("codes"), rows = in.tensor("rows");
  refuse_grad({&sums, &g});
  DivergenceArgs args = {};
  args.normals = code(in.integer(), kSigns, kNormals, "kind") == kNormals;
  if (args.normals && codes.numel()) codes.fail("expected none for normal probes");
  ProbeInputs inputs = {key, codes, rows, in.integer(), in.integer(), in.integer()};
  args.probes = probe_args(g, inputs, args.normals ? 4 : 128);
  EvaluationArgs evaluation = evaluation_args(sums, dots, args.probes.shape.batch, in.integer());
  evaluation.bias = in.number();
  evaluation.factor = in.number();
  int64_t last = inputs.first + g.sizes()[0];
  if (last > evaluation.probes) dots.fail("expected a row for each probe");

  Structure structure = structure_of(g, inputs);
  Parities parities(4 * structure.blocks);
  args.probes.parities = fill_parities(structure, inputs, &parities);
  write_dots(&args, g.sizes()[0], evaluation.dots + inputs.first * evaluation.batch);
  if (last == evaluation.probes) run_units(finish_evaluation, evaluation, evaluation.batch, kEvaluationGrain);
}

}  // namespace fm
