// The least sum of costs with a different column for each row, by shortest augmenting paths (Jonker and Volgenant, "A shortest augmenting
// path algorithm for dense and sparse linear assignment problems", 1987).
//
// Columns have prices v such that every row that has a column has one of least cost - v. The prices begin at a multiple of a guess, the one
// of the greatest lower bound sum_j v_j + sum_i min_j (cost_ij - v_j); the nearer to the optimum, the fewer and shorter are the paths.
// Of equal numbers the first counts, so the result is the same for every instruction set.
#include "vector.h"

namespace fm {
namespace FM_ISA {
namespace {

constexpr double kFar = __builtin_inf();
constexpr double kMultiples[] = {0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5};
constexpr int64_t kBoundRows = 64;  // of a lower bound, at most
constexpr int64_t kBidsOfRow = 2;

using Doubles = Vector<double>;
using Places = Integers<double>;
constexpr int64_t kDoubles = kWidth<double>;

FM_INLINE Doubles load_costs(const double* from) { return load_whole(from); }
FM_INLINE Doubles load_costs(const float* from) {
  typedef float Singles __attribute__((vector_size(kVectorBytes / 2)));
  Singles v;
  __builtin_memcpy(&v, from, sizeof(v));
  return __builtin_convertvector(v, Doubles);
}

FM_INLINE Places first_places() {
  Places places = {};
  for (int64_t i = 0; i < kDoubles; ++i) places[i] = i;
  return places;
}

// The least numbers of a row and where they are.
struct Least {
  double first = kFar, second = kFar;
  int64_t place = 0, second_place = 0;

  FM_METHOD void add(double value, int64_t at) {
    if (value < first || (value == first && at < place)) {
      second = first;
      second_place = place;
      first = value;
      place = at;
    } else if (value < second || (value == second && at < second_place)) {
      second = value;
      second_place = at;
    }
  }
};

// Of cost - price in a row.
template <class T>
Least two_least(const T* costs, const double* prices, int64_t n) {
  Doubles first = all(kFar), second = first;
  Places place = {}, second_place = {}, at = first_places();
  int64_t j = 0;
  for (; j + kDoubles <= n; j += kDoubles, at += kDoubles) {
    Doubles value = load_costs(costs + j) - load_whole(prices + j);
    Places best = value < first, better = value < second;
    second_place = better ? (best ? place : at) : second_place;
    second = better ? (best ? first : value) : second;
    place = best ? at : place;
    first = best ? value : first;
  }
  Least found;
  for (int64_t lane = 0; lane < kDoubles; ++lane) {
    if (first[lane] < kFar) found.add(first[lane], place[lane]);
    if (second[lane] < kFar) found.add(second[lane], second_place[lane]);
  }
  for (; j < n; ++j) found.add(static_cast<double>(costs[j]) - prices[j], j);
  return found;
}

// Columns that `row` reaches at the distance `base` + cost - price have it as their parent. The nearest of those that are not settled.
template <class T>
Least reach(const T* costs, const AssignmentArgs& args, double base, int64_t row) {
  Doubles nearest = all(kFar);
  Places place = {}, at = first_places();
  const Places parent = Places{} + row;
  int64_t j = 0;
  for (; j + kDoubles <= args.n; j += kDoubles, at += kDoubles) {
    Doubles known = load_whole(args.distances + j), found = base + (load_costs(costs + j) - load_whole(args.shifted + j));
    Places shorter = found < known, parents;
    __builtin_memcpy(&parents, args.parents + j, sizeof(parents));
    parents = shorter ? parent : parents;
    known = shorter ? found : known;
    __builtin_memcpy(args.parents + j, &parents, sizeof(parents));
    store_whole(args.distances + j, known);
    Places closer = known < nearest;
    place = closer ? at : place;
    nearest = closer ? known : nearest;
  }
  Least found;
  for (int64_t lane = 0; lane < kDoubles; ++lane)
    if (nearest[lane] < kFar) found.add(nearest[lane], place[lane]);
  for (; j < args.n; ++j) {
    double distance = base + (static_cast<double>(costs[j]) - args.shifted[j]);
    if (distance < args.distances[j]) {
      args.distances[j] = distance;
      args.parents[j] = row;
    }
    if (args.distances[j] < kFar) found.add(args.distances[j], j);
  }
  return found;
}

template <class T>
class Solver {
 public:
  explicit Solver(const AssignmentArgs& args) : args_(args), costs_(static_cast<const T*>(args.costs)) {}

  void solve() {
    for (int64_t i = 0; i < args_.n; ++i) args_.rows[i] = args_.columns[i] = -1;
    choose_prices();
    int64_t waiting = after_bids(after_first_choices());
    list_free_columns();
    for (int64_t i = 0; i < waiting; ++i) augment(args_.waiting[i]);
  }

 private:
  const T* costs_of(int64_t row) const { return costs_ + row * args_.n; }

  double set_prices(double multiple) const {
    double sum = 0;
    for (int64_t j = 0; j < args_.n; ++j) sum += args_.prices[j] = multiple * args_.guess[j];
    return sum;
  }

  // Of the whole sum of costs, as far as some of the rows tell.
  double lower_bound(double multiple) const {
    int64_t every = (args_.n + kBoundRows - 1) / kBoundRows, count = 0;
    double prices = set_prices(multiple), sum = 0;
    for (int64_t i = 0; i < args_.n; i += every, ++count) sum += two_least(costs_of(i), args_.prices, args_.n).first;
    return prices + sum * (static_cast<double>(args_.n) / static_cast<double>(count));
  }

  bool is_guessed() const {
    for (int64_t j = 0; j < args_.n; ++j)
      if (args_.guess[j] != 0) return true;
    return false;
  }

  void choose_prices() const {
    if (!is_guessed()) return void(set_prices(0));
    double best = kMultiples[0], highest = -kFar;
    for (double multiple : kMultiples) {
      double bound = lower_bound(multiple);
      if (bound > highest) {
        highest = bound;
        best = multiple;
      }
    }
    set_prices(best);
  }

  void give(int64_t column, int64_t row) const {
    args_.rows[column] = row;
    args_.columns[row] = column;
  }

  // Every row takes the column of least cost - price, at a price that leaves it as good as the second, if nobody has it. Counts the rest.
  int64_t after_first_choices() const {
    int64_t waiting = 0;
    for (int64_t row = 0; row < args_.n; ++row) {
      Least least = two_least(costs_of(row), args_.prices, args_.n);
      if (args_.rows[least.place] >= 0) {
        args_.waiting[waiting++] = row;
        continue;
      }
      args_.prices[least.place] -= least.second - least.first;
      give(least.place, row);
    }
    return waiting;
  }

  // A row takes the column that is best for it from another. That one's row, or -1.
  int64_t bid(int64_t row) const {
    Least least = two_least(costs_of(row), args_.prices, args_.n);
    double price = args_.prices[least.place] - (least.second - least.first);
    bool lower = price < args_.prices[least.place];
    int64_t column = lower || args_.rows[least.place] < 0 ? least.place : least.second_place, before = args_.rows[column];
    if (lower) args_.prices[column] = price;
    give(column, row);
    if (before >= 0) args_.columns[before] = -1;
    return before;
  }

  // Rows that wait bid for columns, and those that lose theirs in turn, a few times in all. Counts those that are left.
  int64_t after_bids(int64_t waiting) const {
    int64_t left = 0, bids = kBidsOfRow * args_.n;
    for (int64_t i = 0; i < waiting; ++i) {
      int64_t row = args_.waiting[i];
      while (row >= 0 && bids > 0) {
        row = bid(row);
        --bids;
      }
      if (row >= 0) args_.waiting[left++] = row;
    }
    return left;
  }

  void list_free_columns() {
    for (int64_t j = 0; j < args_.n; ++j)
      if (args_.rows[j] < 0) args_.free_columns[free_++] = j;
  }

  // Of columns at the same distance, one that nobody has ends the path: where many costs are equal it would else visit them all.
  int64_t place_of(const Least& nearest) const {
    if (args_.rows[nearest.place] < 0) return nearest.place;
    int64_t place = args_.n;
    for (int64_t i = 0; i < free_; ++i) {
      int64_t column = args_.free_columns[i];
      if (args_.distances[column] == nearest.first && column < place) place = column;
    }
    return place < args_.n ? place : nearest.place;
  }

  void take(int64_t column) {
    int64_t i = 0;
    while (args_.free_columns[i] != column) ++i;
    args_.free_columns[i] = args_.free_columns[--free_];
  }

  // The shortest path from a row to a column that nobody has; every row on it takes the next column (Dijkstra's algorithm).
  void augment(int64_t start) {
    for (int64_t j = 0; j < args_.n; ++j) {
      args_.shifted[j] = args_.prices[j];
      args_.distances[j] = kFar;
    }
    int64_t settled = 0;
    Least nearest = reach(costs_of(start), args_, 0.0, start);
    int64_t column = place_of(nearest);
    while (args_.rows[column] >= 0) {
      int64_t row = args_.rows[column];
      args_.settled[settled] = column;
      args_.settled_distances[settled++] = nearest.first;
      double base = nearest.first - (static_cast<double>(costs_of(row)[column]) - args_.shifted[column]);
      args_.distances[column] = kFar;
      args_.shifted[column] = -kFar;  // nothing is nearer than what is settled
      nearest = reach(costs_of(row), args_, base, row);
      column = place_of(nearest);
    }
    for (int64_t i = 0; i < settled; ++i) args_.prices[args_.settled[i]] += args_.settled_distances[i] - nearest.first;
    take(column);
    turn_over(start, column);
  }

  void turn_over(int64_t start, int64_t column) const {
    for (int64_t row = -1; row != start;) {
      row = args_.parents[column];
      int64_t before = args_.columns[row];
      give(column, row);
      column = before;
    }
  }

  const AssignmentArgs& args_;
  const T* costs_;
  int64_t free_ = 0;  // columns that nobody has
};

}  // namespace

void assignment(const AssignmentArgs& args) {
  if (args.n == 1) args.columns[0] = 0;
  if (args.n < 2) return;
  args.wide ? Solver<double>(args).solve() : Solver<float>(args).solve();
}

}  // namespace FM_ISA
}  // namespace fm
