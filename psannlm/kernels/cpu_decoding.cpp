// Products and attention of decoding steps on a CPU.
//
// A step reads every weight, key and value once, and its time is that of reading them, if the processor is told early
// enough what it will read: weights are prefetched into the second-level cache 16 KB ahead. A sum is formed in the same
// order whatever the number of rows, tokens and threads, so that a row gets the same result in any batch.

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <omp.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

using Floats = at::vec::Vectorized<float>;
using bfloat16 = at::BFloat16;

constexpr int64_t kPrefetchBytes = 16 * 1024;
constexpr int64_t kPrefetchCacheBytes = 8 * 1024;
// Outputs of one tile: its weights stay in the first-level cache while all rows pass.
constexpr int64_t kTileOutputs = 8;

// Sixteen vector registers (AVX2) hold the sums of four rows and two outputs, thirty-two those of eight.
constexpr int kMostRows = Floats::size() >= 16 ? 8 : 4;

#if defined(CPU_CAPABILITY_AVX512)
inline Floats widened(const float* from) { return _mm512_loadu_ps(from); }
inline Floats widened(const bfloat16* from) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
inline Floats widened(const int8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
#else
inline Floats widened(const float* from) { return Floats::loadu(from); }
template <typename T>
inline Floats widened(const T* from) {
  return at::vec::convert<float>(at::vec::Vectorized<T>::loadu(from, Floats::size()));
}
#endif

// The same of the last n elements of a row, fewer than a vector holds, with zeros behind them.
#if defined(CPU_CAPABILITY_AVX512)
inline Floats widened(const float* from, int64_t n) { return _mm512_maskz_loadu_ps((1u << n) - 1, from); }
inline Floats widened(const bfloat16* from, int64_t n) {
  const __m256i halves = _mm256_maskz_loadu_epi16((1u << n) - 1, from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
inline Floats widened(const int8_t* from, int64_t n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8((1u << n) - 1, from)));
}
#else
template <typename T>
inline Floats widened(const T* from, int64_t n) {
  T values[Floats::size()] = {};
  std::copy(from, from + n, values);
  return widened(values);
}
#endif

// The sum of a vector's elements, in one order.
inline float total(const Floats& values) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_reduce_add_ps(values);
#else
  return at::vec::vec_reduce_all<float>([](const Floats& a, const Floats& b) { return a + b; }, values);
#endif
}

// How weights and inputs are loaded, multiplied and added: in float32.
template <typename W, typename X>
struct Dot {
  static constexpr int kWidth = Floats::size();
  using Factor = Floats;
  static Factor weight(const W* from) { return widened(from); }
  static Factor weight(const W* from, int64_t n) { return widened(from, n); }
  static Factor input(const X* from) { return widened(from); }
  static Factor input(const X* from, int64_t n) { return widened(from, n); }
  static Floats added(Factor weight, Factor input, Floats sum) { return at::vec::fmadd(weight, input, sum); }
};

#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
// Pairs of bfloat16, twice as many at once, which the processor multiplies and adds in float32.
template <typename W>
struct PairsOfBfloat16 {
  static constexpr int kWidth = 32;
  using Factor = __m512bh;
  static Factor weight(const bfloat16* from) { return (Factor)_mm512_loadu_si512(from); }
  static Factor weight(const bfloat16* from, int64_t n) { return (Factor)_mm512_maskz_loadu_epi16((1u << n) - 1, from); }
  // Whole numbers up to 256 are exact in bfloat16.
  static Factor weight(const int8_t* from) { return _mm512_cvtne2ps_pbh(widened(from + 16), widened(from)); }
  static Factor weight(const int8_t* from, int64_t n) {
    const Floats second = n > 16 ? widened(from + 16, n - 16) : Floats(0);
    return _mm512_cvtne2ps_pbh(second, n > 16 ? widened(from) : widened(from, n));
  }
  static Factor input(const bfloat16* from) { return weight(from); }
  static Factor input(const bfloat16* from, int64_t n) { return weight(from, n); }
  static Floats added(Factor weight, Factor input, Floats sum) { return _mm512_dpbf16_ps(sum, weight, input); }
};
template <>
struct Dot<bfloat16, bfloat16> : PairsOfBfloat16<bfloat16> {};
template <>
struct Dot<int8_t, bfloat16> : PairsOfBfloat16<int8_t> {};
#endif

// Sums of kRows rows and kOutputs outputs.
template <typename W, typename X, int kRows, int kOutputs>
void block(const W* weight, const X* x, int64_t n_in, float* y, int64_t n_out) {
  using Product = Dot<W, X>;
  Floats sums[kRows * kOutputs];
#pragma GCC unroll 32
  for (int i = 0; i < kRows * kOutputs; i++) sums[i] = Floats(0);
  int64_t k = 0;
  for (; k + Product::kWidth <= n_in; k += Product::kWidth) {
    typename Product::Factor weights[kOutputs];
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; o++) {
      const W* from = weight + o * n_in + k;
      weights[o] = Product::weight(from);
      __builtin_prefetch(reinterpret_cast<const char*>(from) + kPrefetchBytes, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      const auto inputs = Product::input(x + r * n_in + k);
#pragma GCC unroll 8
      for (int o = 0; o < kOutputs; o++)
        sums[r * kOutputs + o] = Product::added(weights[o], inputs, sums[r * kOutputs + o]);
    }
  }
  if (k < n_in) {
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; o++) {
      const auto weights = Product::weight(weight + o * n_in + k, n_in - k);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) {
        const auto inputs = Product::input(x + r * n_in + k, n_in - k);
        sums[r * kOutputs + o] = Product::added(weights, inputs, sums[r * kOutputs + o]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; o++) y[r * n_out + o] = total(sums[r * kOutputs + o]);
}

// kRows rows and n_tile outputs: several outputs at once, so that an input is loaded once for all of them.
template <typename W, typename X, int kRows>
void tile(const W* weight, const X* x, int64_t n_in, float* y, int64_t n_out, int64_t n_tile) {
  constexpr int kOutputs = kRows >= 4 ? 2 : 4;
  int64_t o = 0;
  for (; o + kOutputs <= n_tile; o += kOutputs)
    block<W, X, kRows, kOutputs>(weight + o * n_in, x, n_in, y + o, n_out);
  for (; o < n_tile; o++) block<W, X, kRows, 1>(weight + o * n_in, x, n_in, y + o, n_out);
}

template <typename W, typename X>
void product(const W* weight, const X* x, int64_t n_rows, int64_t n_in, int64_t n_out, float* y, int n_threads) {
  const int64_t n_tiles = (n_out + kTileOutputs - 1) / kTileOutputs;
#pragma omp parallel num_threads(n_threads)
  {
    const int64_t thread = omp_get_thread_num(), n = omp_get_num_threads();
    for (int64_t t = n_tiles * thread / n; t < n_tiles * (thread + 1) / n; t++) {
      const int64_t first = t * kTileOutputs, n_tile = std::min(kTileOutputs, n_out - first);
      const W* weights = weight + first * n_in;
      int64_t row = 0;
      const auto rows = [&](auto count) {
        constexpr int kRows = decltype(count)::value;
        for (; row + kRows <= n_rows; row += kRows)
          tile<W, X, kRows>(weights, x + row * n_in, n_in, y + row * n_out + first, n_out, n_tile);
      };
      rows(std::integral_constant<int, kMostRows>{});
      if constexpr (kMostRows > 4) rows(std::integral_constant<int, 4>{});
      rows(std::integral_constant<int, 2>{});
      rows(std::integral_constant<int, 1>{});
    }
  }
}

// The scores of one query over n_slots keys, q k / sqrt(K) + slope (slot - position); returns the largest of them.
template <typename T>
float scores_of(
    const float* query, const T* keys, int64_t n_slots, int64_t head_dim, float scale, float slope, float* scores) {
  float largest = -std::numeric_limits<float>::infinity();
  for (int64_t slot = 0; slot < n_slots; slot++) {
    const T* key = keys + slot * head_dim;
    Floats sum(0);
    int64_t k = 0;
    for (; k + Floats::size() <= head_dim; k += Floats::size()) {
      __builtin_prefetch(reinterpret_cast<const char*>(key + k) + kPrefetchCacheBytes, 0, 2);
      sum = at::vec::fmadd(widened(key + k), widened(query + k), sum);
    }
    if (k < head_dim) sum = at::vec::fmadd(widened(key + k, head_dim - k), widened(query + k, head_dim - k), sum);
    scores[slot] = total(sum) * scale + slope * static_cast<float>(slot - n_slots + 1);
    largest = std::max(largest, scores[slot]);
  }
  return largest;
}

// Turns scores into exp(score - largest); returns their sum.
float exponentials(float* scores, int64_t n_slots, float largest) {
  Floats sum(0);
  const Floats shift(largest);
  for (int64_t slot = 0; slot < n_slots; slot += Floats::size()) {
    const int64_t n = std::min<int64_t>(Floats::size(), n_slots - slot);
    const Floats weights = (Floats::loadu(scores + slot, n) - shift).exp();
    weights.store(scores + slot, n);
    sum = sum + Floats::set(Floats(0), weights, n);
  }
  return total(sum);
}

// y (K) = sum over slots of weights[slot] values[slot], divided by their sum.
template <typename T>
void weighted_mean(
    const float* weights, const T* values, int64_t n_slots, int64_t head_dim, float sum_of_weights, float* y) {
  constexpr int kParts = 4;
  int64_t k = 0;
  for (; k + kParts * Floats::size() <= head_dim; k += kParts * Floats::size()) {
    Floats sums[kParts];
#pragma GCC unroll 4
    for (int p = 0; p < kParts; p++) sums[p] = Floats(0);
    for (int64_t slot = 0; slot < n_slots; slot++) {
      const T* value = values + slot * head_dim + k;
      const Floats weight(weights[slot]);
#pragma GCC unroll 4
      for (int p = 0; p < kParts; p++)
        sums[p] = at::vec::fmadd(widened(value + p * Floats::size()), weight, sums[p]);
      __builtin_prefetch(reinterpret_cast<const char*>(value) + kPrefetchCacheBytes, 0, 2);
      __builtin_prefetch(reinterpret_cast<const char*>(value) + kPrefetchCacheBytes + 64, 0, 2);
    }
#pragma GCC unroll 4
    for (int p = 0; p < kParts; p++) (sums[p] / Floats(sum_of_weights)).store(y + k + p * Floats::size());
  }
  for (; k < head_dim; k += Floats::size()) {
    const int64_t n = std::min<int64_t>(Floats::size(), head_dim - k);
    Floats sum(0);
    for (int64_t slot = 0; slot < n_slots; slot++)
      sum = at::vec::fmadd(widened(values + slot * head_dim + k, n), Floats(weights[slot]), sum);
    (sum / Floats(sum_of_weights)).store(y + k, n);
  }
}

struct AttentionSizes {
  int64_t n_rows, n_heads, n_tokens, head_dim, n_kv_heads, capacity;
};

// y (B, T, H, K) of queries (B, H, T, K) with any strides but the last, keys and values (B, G, S, K).
template <typename T>
void attention(
    const AttentionSizes& sizes, const float* queries, const int64_t* strides, const T* keys, const T* values,
    const int64_t* positions, const float* slopes, float* y, int n_threads) {
  const int64_t n_shared = sizes.n_heads / sizes.n_kv_heads, row_size = sizes.capacity * sizes.head_dim;
  // The queries of a group of heads, which read the same keys and values, follow each other.
  const int64_t n_queries = sizes.n_rows * sizes.n_heads * sizes.n_tokens;
  const float scale = 1 / std::sqrt(static_cast<float>(sizes.head_dim));
  std::vector<float> all_scores(n_threads * sizes.capacity);
#pragma omp parallel num_threads(n_threads)
  {
    const int64_t thread = omp_get_thread_num(), n = omp_get_num_threads();
    float* scores = all_scores.data() + thread * sizes.capacity;
    for (int64_t i = n_queries * thread / n; i < n_queries * (thread + 1) / n; i++) {
      const int64_t token = i % sizes.n_tokens, head = i / sizes.n_tokens % sizes.n_heads;
      const int64_t row = i / (sizes.n_tokens * sizes.n_heads);
      const int64_t first = (row * sizes.n_kv_heads + head / n_shared) * row_size;
      const int64_t n_slots = positions[row * sizes.n_tokens + token] + 1;
      const float* query = queries + row * strides[0] + head * strides[1] + token * strides[2];
      const float largest = scores_of(query, keys + first, n_slots, sizes.head_dim, scale, slopes[head], scores);
      const float sum_of_weights = exponentials(scores, n_slots, largest);
      weighted_mean(
          scores, values + first, n_slots, sizes.head_dim, sum_of_weights,
          y + ((row * sizes.n_tokens + token) * sizes.n_heads + head) * sizes.head_dim);
    }
  }
}

// Sizes, strides, memory and dtype of a tensor.
struct Described {
  int64_t n_dims = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  void* data = nullptr;
  int32_t dtype = 0;

  explicit Described(AtenTensorHandle tensor) {
    aoti_torch_get_dim(tensor, &n_dims);
    aoti_torch_get_sizes(tensor, &sizes);
    aoti_torch_get_strides(tensor, &strides);
    aoti_torch_get_data_ptr(tensor, &data);
    aoti_torch_get_dtype(tensor, &dtype);
  }

  bool is_dense(int64_t wanted_dims) const {
    if (n_dims != wanted_dims) return false;
    int64_t stride = 1;
    for (int64_t dim = n_dims - 1; dim >= 0; stride *= sizes[dim--])
      if (sizes[dim] != 1 && strides[dim] != stride) return false;
    return true;
  }
};

// Makes a dense float32 tensor; returns its memory, or null.
float* empty_floats(int64_t n_dims, const int64_t* sizes, AtenTensorHandle* tensor) {
  std::vector<int64_t> strides(n_dims, 1);
  for (int64_t dim = n_dims - 1; dim > 0; dim--) strides[dim - 1] = strides[dim] * sizes[dim];
  const auto device = aoti_torch_device_type_cpu();
  if (aoti_torch_empty_strided(n_dims, sizes, strides.data(), aoti_torch_dtype_float32(), device, 0, tensor))
    return nullptr;
  return static_cast<float*>(Described(*tensor).data);
}

}  // namespace

// What compiled code calls for the operator psannlm::few_row_linear.
extern "C" AOTITorchError aoti_torch_cpu_few_row_linear(
    AtenTensorHandle x_handle, AtenTensorHandle weight_handle, int64_t n_threads, AtenTensorHandle* y_handle) {
  const Described x(x_handle), weight(weight_handle);
  if (!x.is_dense(2) || !weight.is_dense(2) || x.sizes[1] != weight.sizes[1]) return AOTI_TORCH_FAILURE;
  const auto multiply = [&](auto w, auto in) {
    using W = decltype(w);
    using X = decltype(in);
    const int64_t sizes[2] = {x.sizes[0], weight.sizes[0]};
    float* y = empty_floats(2, sizes, y_handle);
    if (y == nullptr) return AOTI_TORCH_FAILURE;
    product(
        static_cast<const W*>(weight.data), static_cast<const X*>(x.data), sizes[0], x.sizes[1], sizes[1], y,
        static_cast<int>(n_threads));
    return AOTI_TORCH_SUCCESS;
  };
  const bool in_bf16 = x.dtype == aoti_torch_dtype_bfloat16();
  if (!in_bf16 && x.dtype != aoti_torch_dtype_float32()) return AOTI_TORCH_FAILURE;
  if (weight.dtype == aoti_torch_dtype_bfloat16())
    return in_bf16 ? multiply(bfloat16(), bfloat16()) : multiply(bfloat16(), float());
  if (weight.dtype == aoti_torch_dtype_int8())
    return in_bf16 ? multiply(int8_t(), bfloat16()) : multiply(int8_t(), float());
  if (weight.dtype == aoti_torch_dtype_float32() && !in_bf16) return multiply(float(), float());
  return AOTI_TORCH_FAILURE;
}

// What compiled code calls for the operator psannlm::few_query_attention.
extern "C" AOTITorchError aoti_torch_cpu_few_query_attention(
    AtenTensorHandle q_handle, AtenTensorHandle keys_handle, AtenTensorHandle values_handle,
    AtenTensorHandle positions_handle, AtenTensorHandle slopes_handle, int64_t n_threads, AtenTensorHandle* y_handle) {
  const Described q(q_handle), keys(keys_handle), values(values_handle), positions(positions_handle);
  const Described slopes(slopes_handle);
  const bool is_right = q.n_dims == 4 && q.strides[3] == 1 && q.dtype == aoti_torch_dtype_float32() &&
      keys.is_dense(4) && values.is_dense(4) && keys.dtype == values.dtype && positions.is_dense(2) &&
      positions.dtype == aoti_torch_dtype_int64() && slopes.is_dense(1) && slopes.dtype == aoti_torch_dtype_float32();
  if (!is_right) return AOTI_TORCH_FAILURE;
  const AttentionSizes sizes{q.sizes[0], q.sizes[1], q.sizes[2], q.sizes[3], keys.sizes[1], keys.sizes[2]};
  const bool in_bf16 = keys.dtype == aoti_torch_dtype_bfloat16();
  if (!in_bf16 && keys.dtype != aoti_torch_dtype_float32()) return AOTI_TORCH_FAILURE;
  const auto* places = static_cast<const int64_t*>(positions.data);
  const int64_t n_places = positions.sizes[0] * positions.sizes[1];
  if (n_places != sizes.n_rows * sizes.n_tokens) return AOTI_TORCH_FAILURE;
  for (int64_t i = 0; i < n_places; i++)
    if (places[i] < 0 || places[i] >= sizes.capacity) return AOTI_TORCH_FAILURE;
  const int64_t y_sizes[4] = {sizes.n_rows, sizes.n_tokens, sizes.n_heads, sizes.head_dim};
  float* y = empty_floats(4, y_sizes, y_handle);
  if (y == nullptr) return AOTI_TORCH_FAILURE;
  const auto attend = [&](auto element) {
    using T = decltype(element);
    attention(
        sizes, static_cast<const float*>(q.data), q.strides, static_cast<const T*>(keys.data),
        static_cast<const T*>(values.data), places,
        static_cast<const float*>(slopes.data), y, static_cast<int>(n_threads));
  };
  if (in_bf16)
    attend(bfloat16());
  else
    attend(float());
  return AOTI_TORCH_SUCCESS;
}
