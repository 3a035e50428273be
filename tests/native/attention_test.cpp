// Attention and its gradients under every instruction set of this CPU, against plain loops, on memory of exactly the elements that they
// may touch.
#include "harness.h"

namespace test {
namespace {

struct Case {
  int64_t batch, pixels, heads, features;
};

using Numbers = std::vector<float>;

Numbers numbers(int64_t count, double phase) {
  Numbers found(static_cast<size_t>(count));
  for (size_t i = 0; i < found.size(); ++i) found[i] = static_cast<float>(std::sin(1.7 * static_cast<double>(i) + phase));
  return found;
}

// One head of one sample: how its rows lie.
struct Place {
  const Case& c;
  int64_t sample, head;

  size_t joint(int64_t pixel, int64_t part, int64_t d) const {
    return static_cast<size_t>((((sample * c.pixels + pixel) * 3 + part) * c.heads + head) * c.features + d);
  }
  size_t result(int64_t pixel, int64_t d) const {
    return static_cast<size_t>(((sample * c.pixels + pixel) * c.heads + head) * c.features + d);
  }
};

using Doubles = std::vector<double>;

// Weights [N, N] of one head.
Doubles weights_of(const Place& at, const Numbers& joint) {
  int64_t n = at.c.pixels;
  Doubles p(static_cast<size_t>(n * n));
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < n; ++j) {
      double score = 0;
      for (int64_t d = 0; d < at.c.features; ++d)
        score += static_cast<double>(joint[at.joint(i, 0, d)]) * static_cast<double>(joint[at.joint(j, 1, d)]);
      sum += p[static_cast<size_t>(i * n + j)] = std::exp(score / std::sqrt(static_cast<double>(at.c.features)));
    }
    for (int64_t j = 0; j < n; ++j) p[static_cast<size_t>(i * n + j)] /= sum;
  }
  return p;
}

// The gradients of the scores, from the weights.
Doubles score_gradients(const Place& at, const Doubles& p, const Numbers& joint, const Numbers& grad_out) {
  int64_t n = at.c.pixels;
  Doubles ds(p.size());
  for (int64_t i = 0; i < n; ++i) {
    double level = 0;
    for (int64_t j = 0; j < n; ++j) {
      double dp = 0;
      for (int64_t d = 0; d < at.c.features; ++d)
        dp += static_cast<double>(grad_out[at.result(i, d)]) * static_cast<double>(joint[at.joint(j, 2, d)]);
      ds[static_cast<size_t>(i * n + j)] = dp;
      level += dp * p[static_cast<size_t>(i * n + j)];
    }
    for (int64_t j = 0; j < n; ++j) {
      size_t k = static_cast<size_t>(i * n + j);
      ds[k] = p[k] * (ds[k] - level) / std::sqrt(static_cast<double>(at.c.features));
    }
  }
  return ds;
}

void expect_near(float found, double wanted, const std::string& name) {
  expect(std::fabs(static_cast<double>(found) - wanted) <= 2e-6 * (1.0 + std::fabs(wanted)), name);
}

void check_head(const Place& at, const Numbers& joint, const Numbers& grad_out, const Numbers& out, const Numbers& grad_joint,
                const std::string& name) {
  int64_t n = at.c.pixels;
  Doubles p = weights_of(at, joint), ds = score_gradients(at, p, joint, grad_out);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t d = 0; d < at.c.features; ++d) {
      double result = 0, query = 0, key = 0, value = 0;
      for (int64_t j = 0; j < n; ++j) {
        size_t row = static_cast<size_t>(i * n + j), column = static_cast<size_t>(j * n + i);
        result += p[row] * static_cast<double>(joint[at.joint(j, 2, d)]);
        query += ds[row] * static_cast<double>(joint[at.joint(j, 1, d)]);
        key += ds[column] * static_cast<double>(joint[at.joint(j, 0, d)]);
        value += p[column] * static_cast<double>(grad_out[at.result(j, d)]);
      }
      expect_near(out[at.result(i, d)], result, name);
      expect_near(grad_joint[at.joint(i, 0, d)], query, name + ", queries");
      expect_near(grad_joint[at.joint(i, 1, d)], key, name + ", keys");
      expect_near(grad_joint[at.joint(i, 2, d)], value, name + ", values");
    }
}

void check(const Isa& isa, const Case& c) {
  int64_t count = c.batch * c.pixels * c.heads * c.features;
  Numbers joint = numbers(3 * count, 0.3), grad_out = numbers(count, 0.8);
  Numbers out(static_cast<size_t>(count), NAN), grad_joint(static_cast<size_t>(3 * count), NAN);
  Numbers log_sums(static_cast<size_t>(c.batch * c.heads * c.pixels), NAN);
  fm::AttentionArgs args = {joint.data(), fm::Dtype::float32, c.batch,         c.pixels,        c.heads,
                            c.features,   out.data(),         log_sums.data(), grad_out.data(), grad_joint.data()};
  int64_t heads = c.batch * c.heads, chunks = fm::divide_up(c.pixels, fm::kAttentionQueries);
  for (int64_t unit = 0; unit < heads * chunks; ++unit) isa.attention(args, unit, unit + 1);
  isa.attention_backward(args, 0, heads);
  std::string name = std::string(isa.name) + " attention of " + std::to_string(c.pixels) + " pixels";
  for (int64_t head = 0; head < heads; ++head) check_head(Place{c, head / c.heads, head % c.heads}, joint, grad_out, out, grad_joint, name);
}

// 16-bit numbers, read and written in whole vectors: on memory of exactly their elements.
void check_halves(const Isa& isa, fm::Dtype dtype, const Case& c) {
  size_t count = static_cast<size_t>(c.batch * c.pixels * c.heads * c.features);
  std::vector<uint16_t> joint(3 * count, 0), grad_out(count, 0), out(count, 1), grad_joint(3 * count, 1);
  Numbers log_sums(static_cast<size_t>(c.batch * c.heads * c.pixels), NAN);
  fm::AttentionArgs args = {joint.data(), dtype,      c.batch,         c.pixels,        c.heads,
                            c.features,   out.data(), log_sums.data(), grad_out.data(), grad_joint.data()};
  isa.attention(args, 0, c.batch * c.heads * fm::divide_up(c.pixels, fm::kAttentionQueries));
  isa.attention_backward(args, 0, c.batch * c.heads);
  bool zero = true;
  for (uint16_t bits : out) zero = zero && (bits & 0x7fff) == 0;
  for (uint16_t bits : grad_joint) zero = zero && (bits & 0x7fff) == 0;
  expect(zero, std::string(isa.name) + " attention of zeros of 16 bits");
  for (float level : log_sums) expect_near(level, std::log(static_cast<double>(c.pixels)), "log sums of zeros");
}

}  // namespace
}  // namespace test

int main() {
  using namespace test;
  const std::vector<Case> cases = {{0, 3, 1, 16}, {1, 1, 1, 16}, {2, 5, 3, 32}, {1, 49, 1, 48}, {2, 64, 2, 16}, {1, 195, 1, 112}};
  for (const Isa& isa : instruction_sets()) {
    for (const Case& c : cases) {
      check(isa, c);
      check_halves(isa, fm::Dtype::bfloat16, c);
      check_halves(isa, fm::Dtype::float16, c);
    }
    printf("%s\n", isa.name);
  }
  return failures ? 1 : 0;
}
