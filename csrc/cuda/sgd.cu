// One step of SGD over many tensors on a CUDA device, with the backward of weight standardization
// before it and the new standardized weights behind it.
//
// A tensor that is standardized is rows of memory, one an output channel. A team of threads takes a
// row: a warp, a block, or a large block where it is long. The row waits in shared memory between
//   sums of the row          -> mean, rstd, mean(g), mean(g * wh)
//   projection, decay, momentum, the new weight and momentum
//   statistics of the new row, and the row standardized
// Rows too long for shared memory are read again, from the L2 cache as far as it holds them. Other
// tensors are cut into chunks, which need no sums.
//
// Which tensors there are is a table among the kernel's parameters: nothing is copied beforehand.
//
// Memory passes: read g, w and m; write w, m and the standardized weight, nothing more.
#include <type_traits>

#include "device.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace bit_kernels {
namespace {

constexpr int kThreads = 256, kManyThreads = 1024;  // of a block
constexpr int kWarpColumns = 576, kBlockColumns = 4608;  // longest rows of a warp, of a block
constexpr int kWide = 4;                                // floats of the widest load

__host__ __device__ constexpr int block_threads(int team) {
  return team > kThreads ? team : kThreads;
}

// ---- what a launch works on

struct Entry {
  const float* gradient;
  float* weight;
  float* momentum;
  void* standardized;  // of the norm: a float for each row
  int64_t rows, columns;
  unsigned first_block;
};

constexpr int kEntries = 70;

struct Table {
  int count;
  int stride;  // floats of an array in shared memory
  Entry entries[kEntries];
};

struct Rule {
  float decay, momentum, taken, rate, eps;
  bool decays, has_momentum, nesterov, maximize, fresh, project;
  Element standardized;

  __host__ __device__ bool reads_momentum() const { return has_momentum && !fresh; }

  // The step of one element; m is its momentum.
  __device__ float operator()(float g, float w, float& m) const {
    if (maximize) g = -g;
    if (decays) g = fmaf(decay, w, g);
    if (!has_momentum) return fmaf(rate, g, w);
    m = fresh ? g : fmaf(momentum, m, taken * g);
    return fmaf(rate, nesterov ? fmaf(momentum, m, g) : m, w);
  }
};

// A kernel's parameters have 4 KiB.
static_assert(sizeof(Table) + sizeof(Rule) <= 4096);

__device__ inline const Entry& entry_of_block(const Table& table) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.entries[middle].first_block <= blockIdx.x) low = middle;
    else high = middle - 1;
  }
  return table.entries[low];
}

// ---- rows

// Adds up over the threads of a team; `scratch` has two floats for each of its warps.
template <int kTeam>
__device__ inline void team_sum(float& a, float& b, float* scratch) {
  a = warp_sum(a);
  b = warp_sum(b);
  if constexpr (kTeam > kWarp) {
    constexpr int kWarps = kTeam / kWarp;
    __syncthreads();  // the sums before these have been read
    if (threadIdx.x % kWarp == 0) {
      scratch[threadIdx.x / kWarp] = a;
      scratch[kWarps + threadIdx.x / kWarp] = b;
    }
    __syncthreads();
    a = b = 0;
    for (int w = 0; w < kWarps; ++w) {
      a += scratch[w];
      b += scratch[kWarps + w];
    }
  }
}

// One row in the hands of a team. Each thread works on the same elements all the time, so that only
// sums need a barrier.
template <int kTeam, int kVector, bool kFits>
struct Row {
  using Index = std::conditional_t<kFits, int, int64_t>;

  const Entry& entry;
  int64_t row;
  const float* g;  // where it is read: in shared memory if it fits there
  float *w, *m, *scratch;

  __device__ Row(const Table& table, bool momentum) : entry(entry_of_block(table)) {
    constexpr int kTeams = block_threads(kTeam) / kTeam;
    const int team = threadIdx.x / kTeam;
    row = static_cast<int64_t>(blockIdx.x - entry.first_block) * kTeams + team;
    float* shared = reinterpret_cast<float*>(shared_memory);
    if constexpr (kFits) {
      const int arrays = momentum ? 3 : 2;
      float* mine = shared + team * arrays * table.stride;
      g = mine;
      w = mine + table.stride;
      m = momentum ? w + table.stride : nullptr;
      scratch = shared + kTeams * arrays * table.stride;
    } else {
      g = entry.gradient + row * entry.columns;
      w = entry.weight + row * entry.columns;
      m = momentum ? entry.momentum + row * entry.columns : nullptr;
      scratch = shared;
    }
  }

  __device__ bool exists() const { return row < entry.rows; }

  template <class Body>
  __device__ void for_vectors(const Body& body) const {
    const Index columns = static_cast<Index>(entry.columns);
#pragma unroll 2
    for (Index i = threadIdx.x % kTeam * kVector; i < columns; i += kTeam * kVector) body(i);
  }

  // Brings the row to shared memory, if that is where it is read.
  __device__ void fetch() const {
    if constexpr (kFits) {
      const int64_t first = row * entry.columns;
      for_vectors([&](Index i) {
        copy_async<kVector>(const_cast<float*>(g) + i, entry.gradient + first + i);
        copy_async<kVector>(w + i, entry.weight + first + i);
        if (m != nullptr) copy_async<kVector>(m + i, entry.momentum + first + i);
      });
      wait_for_copies();
    }
  }

  // The sums over the row of what `add` adds to a and b for elements i to i + kVector.
  template <class Add>
  __device__ float2 sum(const Add& add) const {
    float a = 0, b = 0;
    for_vectors([&](Index i) { add(i, a, b); });
    team_sum<kTeam>(a, b, scratch);
    return {a, b};
  }
};

// The gradient of the raw weight, from that of the standardized one:
//   rstd * (g - mean(g)) - rstd^3 * mean((g - mean(g)) * (w - mean)) * (w - mean)
struct Projection {
  float mean_gradient, mean, scale, slope;
  __device__ float operator()(float g, float w) const {
    return fmaf(scale, g - mean_gradient, slope * (w - mean));
  }
};

template <class Row>
__device__ inline float reciprocal_root(const Row& row, float deviations, float eps) {
  return 1 / sqrtf(deviations / static_cast<float>(row.entry.columns) + eps);
}

template <int kVector, class Row>
__device__ inline Projection projection(const Row& row, float eps) {
  const float columns = static_cast<float>(row.entry.columns);
  const float2 sums = row.sum([&](auto i, float& a, float& b) {
    float g[kVector], w[kVector];
    load<kVector>(row.g + i, g);
    load<kVector>(row.w + i, w);
#pragma unroll
    for (int v = 0; v < kVector; ++v) a += g[v], b += w[v];
  });
  Projection p = {sums.x / columns, sums.y / columns, 0, 0};
  const float2 products = row.sum([&](auto i, float& a, float& b) {
    float g[kVector], w[kVector];
    load<kVector>(row.g + i, g);
    load<kVector>(row.w + i, w);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const float away = w[v] - p.mean;
      a = fmaf(away, away, a);
      b = fmaf(g[v] - p.mean_gradient, away, b);
    }
  });
  p.scale = reciprocal_root(row, products.x, eps);
  p.slope = -p.scale * p.scale * (p.scale * (products.y / columns));
  return p;
}

template <int kTeam, int kVector, bool kFits>
__global__ void __launch_bounds__(block_threads(kTeam))
    step_rows(const __grid_constant__ Table table, const __grid_constant__ Rule rule) {
  const Row<kTeam, kVector, kFits> row(table, rule.reads_momentum());
  if (!row.exists()) return;
  row.fetch();
  Projection project = {};
  if (rule.project) project = projection<kVector>(row, rule.eps);

  const int64_t first = row.row * row.entry.columns;
  float* const new_weight = row.entry.weight + first;
  float* const new_momentum = rule.has_momentum ? row.entry.momentum + first : nullptr;
  const float columns = static_cast<float>(row.entry.columns);
  const float mean = row.sum([&](auto i, float& a, float&) {
    float g[kVector], w[kVector], m[kVector] = {};
    load<kVector>(row.g + i, g);
    load<kVector>(row.w + i, w);
    if (rule.reads_momentum()) load<kVector>(row.m + i, m);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      w[v] = rule(rule.project ? project(g[v], w[v]) : g[v], w[v], m[v]);
      a += w[v];
    }
    if (rule.has_momentum) store<kVector>(new_momentum + i, m);
    store<kVector>(new_weight + i, w);
    if constexpr (kFits) store<kVector>(row.w + i, w);
  }).x / columns;
  const float deviations = row.sum([&](auto i, float& a, float&) {
    float w[kVector];
    load<kVector>(row.w + i, w);
#pragma unroll
    for (int v = 0; v < kVector; ++v) a = fmaf(w[v] - mean, w[v] - mean, a);
  }).x;
  const float rstd = reciprocal_root(row, deviations, rule.eps);
  row.for_vectors([&](auto i) {
    float w[kVector];
    load<kVector>(row.w + i, w);
#pragma unroll
    for (int v = 0; v < kVector; ++v) w[v] = (w[v] - mean) * rstd;
    void* const standardized = row.entry.standardized;
    const int64_t at = first + i;
    switch (rule.standardized) {
      case Element::kFloat32: return store<kVector>(static_cast<float*>(standardized) + at, w);
      case Element::kBFloat16:
        return store<kVector>(static_cast<__nv_bfloat16*>(standardized) + at, w);
      case Element::kFloat16: return store<kVector>(static_cast<__half*>(standardized) + at, w);
    }
  });
}

// The sum of squares of each row's projected gradient.
template <int kTeam, int kVector, bool kFits>
__global__ void __launch_bounds__(block_threads(kTeam))
    square_rows(const __grid_constant__ Table table, float eps) {
  const Row<kTeam, kVector, kFits> row(table, false);
  if (!row.exists()) return;
  row.fetch();
  const Projection project = projection<kVector>(row, eps);
  const float square = row.sum([&](auto i, float& a, float&) {
    float g[kVector], w[kVector];
    load<kVector>(row.g + i, g);
    load<kVector>(row.w + i, w);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const float projected = project(g[v], w[v]);
      a = fmaf(projected, projected, a);
    }
  }).x;
  if (threadIdx.x % kTeam == 0) static_cast<float*>(row.entry.standardized)[row.row] = square;
}

// norms[t]: the root of the sum over the rows of tensor t, one block each.
__global__ void __launch_bounds__(kThreads)
    add_rows(const __grid_constant__ Table table, float* __restrict__ norms) {
  const Entry& entry = table.entries[blockIdx.x];
  const float* squares = static_cast<const float*>(entry.standardized);
  double* sums = reinterpret_cast<double*>(shared_memory);
  double sum = 0;
  for (int64_t row = threadIdx.x; row < entry.rows; row += kThreads) sum += squares[row];
  sums[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) norms[blockIdx.x] = static_cast<float>(sqrt(sums[0]));
}

// ---- tensors that are not standardized

constexpr int kVectorsOfThread = 4;

template <int kVector>
constexpr int64_t kChunk = int64_t{kThreads} * kVectorsOfThread * kVector;

template <int kVector>
__device__ inline void step_elements(const Entry& entry, const Rule& rule, int64_t i) {
  float g[kVector], w[kVector], m[kVector] = {};
  load<kVector>(entry.gradient + i, g);
  load<kVector>(entry.weight + i, w);
  if (rule.reads_momentum()) load<kVector>(entry.momentum + i, m);
#pragma unroll
  for (int v = 0; v < kVector; ++v) w[v] = rule(g[v], w[v], m[v]);
  if (rule.has_momentum) store<kVector>(entry.momentum + i, m);
  store<kVector>(entry.weight + i, w);
}

template <int kVector>
__global__ void __launch_bounds__(kThreads)
    step_plain(const __grid_constant__ Table table, const __grid_constant__ Rule rule) {
  const Entry& entry = entry_of_block(table);
  const int64_t chunk = (blockIdx.x - entry.first_block) * kChunk<kVector>;
#pragma unroll 1
  for (int k = 0; k < kVectorsOfThread; ++k) {
    const int64_t i = chunk + (k * kThreads + threadIdx.x) * kVector;
    if (i + kVector <= entry.columns) {
      step_elements<kVector>(entry, rule, i);
    } else if (kVector > 1) {
      for (int64_t rest = i; rest < entry.columns; ++rest) step_elements<1>(entry, rule, rest);
    }
  }
}

// ---- launches

// Fills tables with the tensors that `choose` takes and calls run(table, blocks) with each.
// blocks_of(tensor) is what a tensor needs.
template <class Choose, class Blocks, class Run>
const char* for_tables(const SgdTensor* tensors, int64_t count, int stride, const Choose& choose,
                       const Blocks& blocks_of, const Run& run) {
  Table table = {};
  table.stride = stride;
  int64_t blocks = 0;
  auto flush = [&]() -> const char* {
    const char* wrong = table.count == 0 ? nullptr : run(table, blocks);
    table.count = 0;
    blocks = 0;
    return wrong;
  };
  for (int64_t t = 0; t < count; ++t) {
    const SgdTensor& tensor = tensors[t];
    if (!choose(tensor)) continue;
    const int64_t more = blocks_of(tensor);
    if (table.count == kEntries || (table.count > 0 && blocks + more > kMostBlocks))
      if (const char* wrong = flush()) return wrong;
    table.entries[table.count++] = {tensor.gradient,     tensor.weight, tensor.momentum,
                                    tensor.standardized, tensor.rows,   tensor.columns,
                                    static_cast<unsigned>(blocks)};
    blocks += more;
  }
  return flush();
}

bool inputs_aligned(const SgdTensor& tensor) {
  return is_aligned(tensor.gradient) && is_aligned(tensor.weight) && is_aligned(tensor.momentum);
}

int team_of(const SgdTensor& tensor) {
  return tensor.columns <= kWarpColumns ? kWarp
         : tensor.columns <= kBlockColumns ? kThreads
                                           : kManyThreads;
}

// What a kernel of rows keeps of each in shared memory, and whether it writes vectors to
// `standardized`.
struct Demand {
  int arrays;
  bool writes_rows;
};

// Calls run(table, grid) with the rows that a team of so many threads, such vectors, and such a
// place for the row are for.
template <int kTeam, int kVector, bool kFits, class Run>
const char* for_rows_of(const SgdTensor* tensors, int64_t count, Demand demand,
                        const Device& device, const Run& run) {
  constexpr int kTeams = block_threads(kTeam) / kTeam;
  constexpr int64_t kScratch = kTeam > kWarp ? int64_t{8} * kTeam / kWarp : 0;
  auto stride_of = [](int64_t columns) { return divide_up(columns, kWide) * kWide; };
  auto shared_for = [&](int64_t stride) {
    return int64_t{4} * kTeams * demand.arrays * stride + kScratch;
  };
  int64_t stride = 0;
  auto choose = [&](const SgdTensor& tensor) {
    const bool wide = tensor.columns % kWide == 0 && inputs_aligned(tensor) &&
                      (!demand.writes_rows || is_aligned(tensor.standardized));
    const bool fits = shared_for(stride_of(tensor.columns)) <= device.shared_per_block;
    return tensor.rows * tensor.columns > 0 && team_of(tensor) == kTeam &&
           (wide ? kWide : 1) == kVector && fits == kFits;
  };
  if (kFits)
    for (int64_t t = 0; t < count; ++t)
      if (choose(tensors[t]) && stride < tensors[t].columns) stride = stride_of(tensors[t].columns);
  auto blocks_of = [](const SgdTensor& tensor) { return divide_up(tensor.rows, kTeams); };
  return for_tables(tensors, count, static_cast<int>(stride), choose, blocks_of,
                    [&](const Table& table, int64_t blocks) {
                      return run(table, Grid{blocks, block_threads(kTeam), shared_for(stride)});
                    });
}

// Calls run<kTeam, kVector, kFits>(table, grid) until all rows have been dealt with.
template <class Run>
const char* for_rows(const SgdTensor* tensors, int64_t count, Demand demand, const Device& device,
                     const Run& run) {
  const char* wrong = nullptr;
  auto with = [&]<int kTeam, int kVector, bool kFits>() {
    if (wrong != nullptr) return;
    wrong = for_rows_of<kTeam, kVector, kFits>(
        tensors, count, demand, device, [&](const Table& table, const Grid& grid) {
          return run.template operator()<kTeam, kVector, kFits>(table, grid);
        });
  };
  with.template operator()<kWarp, kWide, true>();
  with.template operator()<kWarp, 1, true>();
  with.template operator()<kThreads, kWide, true>();
  with.template operator()<kThreads, 1, true>();
  with.template operator()<kManyThreads, kWide, true>();
  with.template operator()<kManyThreads, 1, true>();
  with.template operator()<kManyThreads, kWide, false>();
  with.template operator()<kManyThreads, 1, false>();
  return wrong;
}

template <int kVector>
const char* step_plain_tensors(const SgdTensor* tensors, int64_t count, const Rule& rule,
                               void* stream) {
  auto choose = [](const SgdTensor& tensor) {
    return tensor.columns > 0 && (inputs_aligned(tensor) ? kWide : 1) == kVector;
  };
  auto blocks_of = [](const SgdTensor& tensor) {
    return divide_up(tensor.columns, kChunk<kVector>);
  };
  return for_tables(tensors, count, 0, choose, blocks_of, [&](const Table& table, int64_t blocks) {
    return launch(step_plain<kVector>, {blocks, kThreads, 0}, stream, table, rule);
  });
}

}  // namespace

extern "C" const char* bit_kernels_sgd(const SgdTensor* tensors, int64_t count,
                                       Element standardized, const SgdOptions* options,
                                       int number, void* stream) {
  Device device;
  if (const char* wrong = in_words(device.read(number))) return wrong;
  if (count == 0) return nullptr;
  const Rule rule = {static_cast<float>(options->weight_decay),
                     static_cast<float>(options->momentum),
                     static_cast<float>(1 - options->dampening),
                     static_cast<float>(-options->lr),
                     static_cast<float>(options->eps),
                     options->weight_decay != 0,
                     options->momentum != 0,
                     options->nesterov,
                     options->maximize,
                     options->fresh,
                     options->project,
                     standardized};
  if (tensors[0].standardized == nullptr) {
    const char* wrong = step_plain_tensors<kWide>(tensors, count, rule, stream);
    return wrong != nullptr ? wrong : step_plain_tensors<1>(tensors, count, rule, stream);
  }
  return for_rows(tensors, count, {rule.reads_momentum() ? 3 : 2, true}, device,
                  [&]<int kTeam, int kVector, bool kFits>(const Table& table, const Grid& grid) {
                    return launch(step_rows<kTeam, kVector, kFits>, grid, stream, table, rule);
                  });
}

extern "C" const char* bit_kernels_sgd_gradient_norm(const SgdTensor* tensors, int64_t count,
                                                     double eps, float* squares, float* norms,
                                                     int number, void* stream) {
  Device device;
  if (const char* wrong = in_words(device.read(number))) return wrong;
  // Each tensor's own part of `squares` goes where its standardized form would.
  constexpr int64_t kAtOnce = kEntries;
  for (int64_t first = 0; first < count; first += kAtOnce) {
    const int64_t some = minimum(kAtOnce, count - first);
    SgdTensor part[kAtOnce];
    for (int64_t t = 0; t < some; ++t) {
      part[t] = tensors[first + t];
      if (part[t].columns == 0) part[t].rows = 0;
      part[t].standardized = squares;
      squares += part[t].rows;
    }
    const float small = static_cast<float>(eps);
    const char* wrong = for_rows(
        part, some, {2, false}, device,
        [&]<int kTeam, int kVector, bool kFits>(const Table& table, const Grid& grid) {
          return launch(square_rows<kTeam, kVector, kFits>, grid, stream, table, small);
        });
    if (wrong != nullptr) return wrong;
    wrong = for_tables(
        part, some, 0, [](const SgdTensor&) { return true; },
        [](const SgdTensor&) -> int64_t { return 1; },
        [&](const Table& table, int64_t blocks) {
          const Grid grid = {blocks, kThreads, int64_t{kThreads} * sizeof(double)};
          return launch(add_rows, grid, stream, table, norms + first);
        });
    if (wrong != nullptr) return wrong;
  }
  return nullptr;
}

}  // namespace bit_kernels
