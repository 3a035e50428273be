// The kernels of sampling and likelihood under every instruction set of this CPU, against plain loops.
#include "cpu/elementwise.h"
#include "harness.h"

namespace test {
namespace {

const Layout kLayouts[] = {Layout::contiguous, Layout::channels_last, Layout::sliced, Layout::transposed_batch};
const Key kKey = {7u, 0x80000009u, 0xffffffffu, 4294967290ll, nullptr};  // ids wrap at 2^32

std::vector<Shape> shapes() {
  return {{5, 1, 1, 1},    {40, 1, 2, 2},    {7, 1, 37, 37}, {3, 3, 64, 8},    {2, 5, 63, 9},    {2, 3, 1024, 32},
          {2, 70, 16, 4},  {1, 2, 1640, 41}, {2, 130, 9, 3}, {2, 1, 1100, 11}, {1, 17, 2052, 2}, {3, 3, 129, 43},
          {2, 20, 128, 8}, {0, 3, 16, 4},    {4, 1, 0, 0},   {4, 0, 16, 4}};
}

std::string describe(const Isa& isa, const Shape& s, int layout) {
  return std::string(isa.name) + " [" + std::to_string(s.batch) + ", " + std::to_string(s.channels) + ", " + std::to_string(s.positions) +
         "] layout " + std::to_string(layout);
}

fm::HalvedView whole(const View& view) { return fm::HalvedView{view, nullptr}; }

// x, six k, and a k in two halves, each in a layout of its own.
template <class T>
struct StepProblem {
  static constexpr int kTerms = 7;
  Shape shape;
  Tensor<T> out, copy, x;
  std::vector<Tensor<T>> k;
  Tensor<T> doubled;
  std::vector<fm::StepTerm> terms;

  StepProblem(const Shape& s, int layout)
      : shape(s),
        out(s, kLayouts[layout], 1),
        copy(s, kLayouts[(layout + 1) % 4], 2),
        x(s, kLayouts[(layout + 2) % 4], 3),
        doubled(Shape{2 * s.batch, s.channels, s.positions, s.width}, kLayouts[layout], 1) {
    x.fill(1);
    doubled.fill(2);
    for (int j = 0; j < kTerms; ++j) {
      k.emplace_back(s, kLayouts[(layout * j) % 4], j);
      k.back().fill(static_cast<uint32_t>(3 + j));
    }
  }

  static double coefficient(int j) { return 0.5 - 0.25 * j; }

  View half(int64_t which) {
    View view = doubled.view();
    view.data = static_cast<T*>(view.data) + which * shape.batch * view.batch_stride;
    return view;
  }

  // The last term is the guided one where there is one.
  fm::StepArgs args(int count, bool guided, const View& kept = {}) {
    fm::StepArgs a = {};
    a.shape = shape;
    a.out = out.view();
    a.x = x.view();
    a.copy = whole(copy.view());
    a.kept = kept;
    a.coefficient = 0.75;
    a.guidance = 1.5;
    a.wide = sizeof(T) == 8;
    a.count = count;
    terms.clear();
    for (int j = 0; j < count; ++j) terms.push_back(fm::StepTerm{whole(k[static_cast<size_t>(j)].view()), coefficient(j)});
    if (guided) terms.back().k = fm::HalvedView{half(0), half(1).data};
    a.terms = terms.data();
    std::vector<View*> views = {&a.out, &a.x, &a.copy.first};
    if (kept.data) views.push_back(&a.kept);
    for (fm::StepTerm& term : terms) views.push_back(&term.k.first);
    a.tiling = fm::plan_elementwise(&a.shape, fm::Views{views.data(), static_cast<int64_t>(views.size())});
    return a;
  }

  double expected(int count, bool guided, int64_t b, int64_t c, int64_t p) {
    double y = 0.75 * x.at(b, c, p);
    for (int j = 0; j < count - guided; ++j) y += coefficient(j) * k[static_cast<size_t>(j)].at(b, c, p);
    double unconditional = doubled.at(shape.batch + b, c, p);
    return guided ? y + coefficient(count - 1) * (unconditional + 1.5 * (doubled.at(b, c, p) - unconditional)) : y;
  }
};

template <class T>
void check_step(const Isa& isa, const Shape& shape, int layout, int count, bool guided) {
  StepProblem<T> problem(shape, layout);
  fm::StepArgs args = problem.args(count, guided);
  if (shape.batch * shape.channels * shape.positions) isa.step(args, 0, args.tiling.units);
  problem.out.for_each([&](int64_t b, int64_t c, int64_t p, T& y) {
    expect(close(y, problem.expected(count, guided, b, c, p), sizeof(T) == 8 ? 1e-14 : 4e-6), "step " + describe(isa, shape, layout));
    expect(problem.copy.at(b, c, p) == y, "copy of step " + describe(isa, shape, layout));
  });
}

// The last k is kept as it came, beside a copy in another layout.
template <class T>
void check_kept(const Isa& isa, const Shape& shape, int layout, int count) {
  StepProblem<T> problem(shape, layout);
  Tensor<T> kept(shape, kLayouts[(layout + 3) % 4], 3);
  fm::StepArgs args = problem.args(count, false, kept.view());
  if (shape.batch * shape.channels * shape.positions) isa.step(args, 0, args.tiling.units);
  problem.out.for_each([&](int64_t b, int64_t c, int64_t p, T& y) {
    expect(close(y, problem.expected(count, false, b, c, p), sizeof(T) == 8 ? 1e-14 : 4e-6),
           "keeping step " + describe(isa, shape, layout));
    expect(kept.at(b, c, p) == problem.k[static_cast<size_t>(count - 1)].at(b, c, p), "kept k " + describe(isa, shape, layout));
  });
}

// One long run that needs no buffer, of memory without gaps.
template <class T>
void check_kept_run(const Isa& isa, int64_t positions) {
  Shape shape = {1, 1, positions, 1};
  StepProblem<T> problem(shape, 0);
  Tensor<T> kept(shape, Layout::contiguous, 1);
  fm::StepArgs args = problem.args(3, false, kept.view());
  args.copy = {};
  args.x = problem.k[6].view();
  isa.step(args, 0, args.tiling.units);
  kept.for_each([&](int64_t b, int64_t c, int64_t p, T& k) {
    double x = problem.x.at(b, c, p), own = problem.k[6].at(b, c, p);
    double expected = problem.expected(3, false, b, c, p) + 0.75 * (own - x);
    expect(close(problem.out.at(b, c, p), expected, sizeof(T) == 8 ? 1e-14 : 4e-6), std::string("a run that keeps ") + isa.name);
    expect(k == problem.k[2].at(b, c, p), std::string("kept k of a run ") + isa.name);
  });
}

// Many small samples and whole batches become long runs, whatever the order of the units.
void check_step_ranges(const Isa& isa, const Shape& shape) {
  StepProblem<float> whole_range(shape, 0), pieces(shape, 0);
  fm::StepArgs a = whole_range.args(3, false), b = pieces.args(3, false);
  a.copy = b.copy = {};
  if (shape.batch * shape.channels * shape.positions == 0) return;
  isa.step(a, 0, a.tiling.units);
  for (int64_t unit = b.tiling.units; unit-- > 0;) isa.step(b, unit, unit + 1);
  whole_range.out.for_each(
      [&](int64_t i, int64_t c, int64_t p, float& y) { expect(y == pieces.out.at(i, c, p), "single units of a step"); });
}

// The error is the combination of a StepProblem, x its first slope; y and end in layouts of their own.
template <class T>
struct ErrorProblem {
  StepProblem<T> slopes;
  Tensor<T> y, end;
  std::vector<double> partial;

  ErrorProblem(const Shape& s, int layout) : slopes(s, layout), y(s, kLayouts[(layout + 1) % 4], 2), end(s, kLayouts[layout], 1) {
    y.fill(20);
    end.fill(21);
  }

  fm::ErrorArgs args(int count) {
    fm::ErrorArgs a = {slopes.args(count, false), y.view(), end.view(), 0.5, 0.25, nullptr};
    a.error.shape = slopes.shape;
    a.error.x = slopes.x.view();
    for (int j = 0; j < count; ++j) slopes.terms[static_cast<size_t>(j)].k = whole(slopes.k[static_cast<size_t>(j)].view());
    std::vector<View*> views = {&a.y, &a.end, &a.error.x};
    for (fm::StepTerm& term : slopes.terms) views.push_back(&term.k.first);
    a.error.tiling = fm::plan_samples(&a.error.shape, fm::Views{views.data(), static_cast<int64_t>(views.size())});
    partial.assign(static_cast<size_t>(slopes.shape.batch * fm::tiles_per_sample(a.error.tiling)), std::nan(""));
    a.partial = partial.data();
    return a;
  }

  double square(int count, int64_t b, int64_t c, int64_t p) {
    double size = std::fmax(std::fabs(y.at(b, c, p)), std::fabs(end.at(b, c, p)));
    double ratio = slopes.expected(count, false, b, c, p) / (0.25 + 0.5 * size);
    return ratio * ratio;
  }
};

template <class T>
void check_error(const Isa& isa, const Shape& shape, int layout, int count) {
  ErrorProblem<T> problem(shape, layout);
  fm::ErrorArgs args = problem.args(count);
  isa.error(args, 0, args.error.tiling.units);
  int64_t tiles = fm::tiles_per_sample(args.error.tiling);
  for (int64_t b = 0; b < shape.batch; ++b) {
    double sum = 0, expected = 0;
    for (int64_t i = 0; i < tiles; ++i) sum += problem.partial[static_cast<size_t>(b * tiles + i)];
    for (int64_t c = 0; c < shape.channels; ++c)
      for (int64_t p = 0; p < shape.positions; ++p) expected += problem.square(count, b, c, p);
    expect(close(sum, expected, sizeof(T) == 8 ? 1e-13 : 2e-5), "error " + describe(isa, shape, layout));
  }
  std::vector<double> all = problem.partial;
  for (int64_t unit = args.error.tiling.units; unit-- > 0;) isa.error(args, unit, unit + 1);
  expect(all == problem.partial, "single units of an error");
}

// Samples before either of two stops, with errors from none to NaN, in memory of exactly the numbers that a call may touch.
struct ControlProblem {
  static constexpr int64_t kStages = 3;
  std::vector<double> numbers, times, means, stops = {0.0, 0.5, 1.0}, nodes = {0.0, 0.5, 1.0};
  std::vector<float> factors;
  std::vector<int64_t> counts, totals = {0, 0, 0};
  std::vector<uint8_t> accepted;
  int64_t batch, parts;

  ControlProblem(int64_t samples, int64_t rows) : batch(samples), parts(rows) {
    size_t size = static_cast<size_t>(samples);
    numbers.resize(3 * size), counts.resize(3 * size), means.resize(static_cast<size_t>(rows) * size, 0.0);
    times.resize(kStages * size), factors.resize(2 * size), accepted.resize(size);
    for (size_t i = 0; i < size; ++i) {
      numbers[i] = 0.05 * static_cast<double>(i % 9);
      numbers[size + i] = numbers[2 * size + i] = i % 7 ? 0.1 : 1e-30;
      counts[i] = 1 + static_cast<int64_t>(i % 2), counts[size + i] = 5, counts[2 * size + i] = i % 5 != 4;
      if (rows) means[i] = i % 11 == 3 ? NAN : 0.2 * static_cast<double>(i % 8);
    }
  }

  fm::ControlCall call() {
    return fm::ControlCall{batch,        parts,          3,     kStages,      numbers.data(), counts.data(), totals.data(), accepted.data(),
                           times.data(), factors.data(), false, means.data(), stops.data(),   nodes.data(),  5.0,           6};
  }
};

void check_control(const Isa& isa, int64_t batch, int64_t parts) {
  ControlProblem whole(batch, parts), single(batch, parts);
  int64_t units = (batch + fm::kControlSamples - 1) / fm::kControlSamples, on_the_way = 0, accepted = 0;
  isa.control(whole.call(), 0, units);
  for (int64_t unit = units; unit-- > 0;) isa.control(single.call(), unit, unit + 1);
  expect(whole.numbers == single.numbers && whole.counts == single.counts && whole.totals == single.totals, "single units of a control");
  for (int64_t i = 0; i < batch; ++i) {
    size_t at = static_cast<size_t>(i), rows = static_cast<size_t>(batch);
    double t = whole.numbers[at], step = whole.numbers[2 * rows + at];
    for (size_t j = 0; j < ControlProblem::kStages; ++j)
      expect(close(whole.times[j * rows + at], t + whole.nodes[j] * step, 1e-14), "times of a control");
    expect(whole.factors[at] == static_cast<float>(step), "factors of a control");
    on_the_way += whole.counts[2 * rows + at] == 1;
    accepted += whole.accepted[at];
  }
  expect(whole.totals[0] == on_the_way && whole.totals[2] == accepted, "totals of a control");
  expect(parts > 0 || accepted == 0, "nothing tried, nothing accepted");
}

void check_merging() {
  View a = {nullptr, Dtype::float32, 6, 2, 1}, b = a;
  View* both[] = {&a, &b};
  Shape shape = {4, 3, 2, 2};
  fm::plan_elementwise(&shape, fm::Views{both, 2});
  expect(shape.batch == 1 && shape.channels == 1 && shape.positions == 24 && a.position_stride == 1, "a contiguous batch is one run");
  a = b = View{nullptr, Dtype::float32, 6, 1, 3};
  shape = {4, 3, 2, 2};
  fm::plan_elementwise(&shape, fm::Views{both, 2});
  expect(shape.positions == 24 && a.position_stride == 1, "a channels_last batch is one run");
  a = View{nullptr, Dtype::float32, 6, 2, 1};
  shape = {4, 3, 2, 2};
  fm::plan_elementwise(&shape, fm::Views{both, 2});
  expect(shape.batch == 4 && shape.channels == 3 && shape.positions == 2, "mixed layouts are not merged");
}

struct SignProblem {
  Shape shape;
  int64_t probes, first, share;
  std::vector<int64_t> codes, rows;
  std::vector<uint32_t> parities;

  SignProblem(const Isa& isa, const Shape& s, bool structured) : shape(s), probes(3), first(2), share(2) {
    if (!structured) return;
    uint64_t weyl = 1;
    for (int64_t i = 0; i < s.channels * s.positions; ++i) codes.push_back(static_cast<int64_t>(weyl += 0x9E3779B97F4A7C15ull));
    for (int64_t i = 0; i < probes; ++i) rows.push_back(static_cast<int64_t>(weyl *= 0xD1342543DE82EF95ull));
    int64_t blocks = probes * s.channels * ((s.positions + 127) / 128);
    parities.resize(static_cast<size_t>(4 * blocks) + 1);
    isa.parity(fm::ParityArgs{codes.data(), rows.data(), s.channels, s.positions, parities.data()}, 0, blocks);
  }

  fm::ProbeArgs args(const View& view, const fm::Drawn& drawn) const {
    fm::ProbeArgs a = {};
    a.shape = shape;
    a.view = view;
    a.probe_stride = 0;
    a.key = kKey;
    a.index = 5;
    a.first = first;
    a.share = share;
    a.parities = parities.empty() ? nullptr : parities.data();
    a.tiling = fm::plan(&a.shape, {&a.view}, drawn);
    return a;
  }

  uint32_t purpose(int64_t probe) const { return 2u | static_cast<uint32_t>(5 + (first + probe) / share) << 8; }

  double sign(int64_t probe, int64_t b, int64_t c, int64_t p) const {
    fm::Stream stream = {kKey.seed_low, kKey.seed_high, kKey.step, purpose(probe)};
    fm::Words w = fm::stream_words(stream, id_of(kKey, b), static_cast<uint32_t>(c * ((shape.positions + 127) / 128) + p / 128));
    uint32_t bit = w.w[p % 128 / 32] >> (p % 32) & 1u;
    if (!codes.empty()) {
      uint64_t common = static_cast<uint64_t>(codes[static_cast<size_t>(c * shape.positions + p)] & rows[static_cast<size_t>(probe)]);
      for (; common; common &= common - 1) bit ^= 1u;
    }
    return bit ? -1.0 : 1.0;
  }
};

// One probe at a time: the units of probe j follow those of probe j - 1.
void check_probe(const Isa& isa, const Shape& shape, int layout, bool structured) {
  SignProblem problem(isa, shape, structured);
  for (int64_t probe = 0; probe < problem.probes; ++probe) {
    Tensor<float> out(shape, kLayouts[layout], 1);
    fm::ProbeArgs args = problem.args(out.view(), fm::kDrawnSigns);
    isa.probe(args, probe * args.tiling.units, (probe + 1) * args.tiling.units);
    out.for_each([&](int64_t b, int64_t c, int64_t p, float& x) {
      expect(static_cast<double>(x) == problem.sign(probe, b, c, p), "probe " + describe(isa, shape, layout));
    });
  }
}

template <class T>
void check_divergence(const Isa& isa, const Shape& shape, int layout, bool structured, bool normals) {
  SignProblem problem(isa, shape, structured);
  Tensor<T> g(shape, kLayouts[layout], 1);
  g.fill(9);
  fm::DivergenceArgs args = {problem.args(g.view(), normals ? fm::kDrawnNumbers : fm::kDrawnSigns), normals, nullptr};
  int64_t tiles = fm::tiles_per_sample(args.probes.tiling), units = args.probes.tiling.units;
  std::vector<double> partial(static_cast<size_t>(problem.probes * shape.batch * tiles));
  args.partial = partial.data();
  for (int64_t unit = problem.probes * units; unit-- > 0;) isa.divergence(args, unit, unit + 1);
  std::vector<double> at_once(partial.size());
  args.partial = at_once.data();
  isa.divergence(args, 0, problem.probes * units);
  expect(partial == at_once, "single units of the divergence");
  for (int64_t i = 0; tiles > 0 && i < problem.probes * shape.batch; ++i) {
    double sum = 0, expected = 0, size = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) sum += partial[static_cast<size_t>(i * tiles + tile)];
    for (int64_t c = 0; c < shape.channels; ++c)
      for (int64_t p = 0; p < shape.positions; ++p) {
        int64_t probe = i / shape.batch, b = i % shape.batch;
        double z =
            normals ? static_cast<double>(scalar_normal(shape, kKey, problem.purpose(probe), b, c, p)) : problem.sign(probe, b, c, p);
        expected += z * static_cast<double>(g.at(b, c, p));
        size += std::fabs(z * static_cast<double>(g.at(b, c, p)));
      }
    double tolerance = sizeof(T) == 8 && !normals ? 1e-14 : 4e-6;
    expect(std::fabs(sum - expected) <= tolerance * (size + 1), "divergence " + describe(isa, shape, layout));
  }
}

}  // namespace
}  // namespace test

int main() {
  using namespace test;
  check_merging();
  for (const Isa& isa : instruction_sets()) {
    for (const Shape& shape : shapes()) {
      for (int layout = 0; layout < 4; ++layout) {
        for (int count = 1; count <= StepProblem<float>::kTerms; ++count) check_step<float>(isa, shape, layout, count, count % 2 == 0);
        check_step<double>(isa, shape, layout, 5, true);
        for (int count : {1, 3, 7}) check_kept<float>(isa, shape, layout, count);
        check_kept<double>(isa, shape, layout, 2);
        for (int count : {0, 1, 4, 6}) check_error<float>(isa, shape, layout, count);
        check_error<double>(isa, shape, layout, 5);
        for (bool structured : {false, true}) {
          check_probe(isa, shape, layout, structured);
          check_divergence<float>(isa, shape, layout, structured, false);
        }
        check_divergence<double>(isa, shape, layout, true, false);
        check_divergence<float>(isa, shape, layout, false, true);
        check_divergence<double>(isa, shape, layout, false, true);
      }
      check_step_ranges(isa, shape);
    }
    for (int64_t positions : {1, 7, 4099}) {
      check_kept_run<float>(isa, positions);
      check_kept_run<double>(isa, positions);
    }
    for (int64_t batch : {0, 1, 16, 37, 500})
      for (int64_t parts : {0, 1, 2}) check_control(isa, batch, parts);
    printf("%s\n", isa.name);
  }
  return failures ? 1 : 0;
}
