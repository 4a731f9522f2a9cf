// CPU version of kernels.py and agreement.py: one LION step, or the count of agreeing signs.
//
// The operations and their order are those of megatron_lion.optim.lion.Lion and megatron_lion.optim.precision, bit for
// bit, which needs -ffp-contract=off and no -ffast-math (megatron_lion.optim.cpp_compiler has the flags). Every tensor
// passes through small float32 arrays that stay in the first cache. The form of a tensor is tested once a block, so that
// one loop serves every mode and compiles in two seconds instead of half a minute.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr int BLOCK = 512;               // elements at a time, a multiple of INT8_BLOCK
constexpr int INT8_BLOCK = 32;
// Elements that a thread takes at a time, a multiple of BLOCK: so no two threads share an int8 block and its scale.
constexpr std::int64_t CHUNK = 1 << 16;
constexpr float SMALLEST_SCALE = 0x1p-126f;
constexpr float ONE_127TH = static_cast<float>(1.0 / 127);
constexpr float ROUNDING = 0x1.8p23f;    // adding and subtracting it rounds |x| < 2^22 to an integer, ties to even

// Forms of tensors and columns of the tables; they must match cpp.py and tensor_tables.py.
enum Form { NONE, FLOAT32, BFLOAT16, INT8, SPLIT32, SPLIT24 };
struct Row {
  std::int64_t param, grad, exp_avg, master, numel, group, slot;
};
struct Group {
  float weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2, lr, sign;  // sign: -1 to maximize
};
struct Work {
  const Row* rows;
  std::int64_t num_rows;
  const Group* groups;
  const float* cautions;  // of every slot; null unless LION is cautious
  std::int64_t* counts;   // of every slot; null: update instead of counting
  float multipliers[2];
  std::int32_t begin, param, grad, master, momentum, threads;
};

inline float as_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::uint32_t as_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline std::uint16_t to_bfloat16(float value) {  // to nearest even; NaN stays NaN
  std::uint32_t bits = as_bits(value);
  std::uint32_t nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return static_cast<std::uint16_t>(value == value ? nearest : 0x7FC0);
}

inline float from_bfloat16(std::uint16_t bits) { return as_float(static_cast<std::uint32_t>(bits) << 16); }

template <class Element>
Element* place(std::int64_t address, std::int64_t start) {
  return reinterpret_cast<Element*>(address) + start;
}

// Returns the stored values as float32: in place if they are float32, else decoded into `buffer`.
float* read(int form, std::int64_t address, std::int64_t start, int count, float* __restrict buffer) {
  if (form == FLOAT32) return place<float>(address, start);
  const auto* __restrict stored = place<std::uint16_t>(address, start);
  for (int i = 0; i < count; ++i) buffer[i] = from_bfloat16(stored[i]);
  return buffer;
}

void write_bfloat16(std::int64_t address, std::int64_t start, int count, const float* __restrict values) {
  auto* __restrict stored = place<std::uint16_t>(address, start);
  for (int i = 0; i < count; ++i) stored[i] = to_bfloat16(values[i]);
}

// Address of a packed momentum's scales: after its elements, whose last block is padded to INT8_BLOCK.
inline std::uint16_t* scales_of(const Row& row, std::int64_t start) {
  const std::int64_t blocks = (row.numel + INT8_BLOCK - 1) / INT8_BLOCK;
  return reinterpret_cast<std::uint16_t*>(row.exp_avg + blocks * INT8_BLOCK) + start / INT8_BLOCK;
}

float* read_int8(const Row& row, std::int64_t start, int count, float* __restrict buffer) {
  const auto* __restrict elements = place<std::int8_t>(row.exp_avg, start);
  const std::uint16_t* scales = scales_of(row, start);
  for (int first = 0; first < count; first += INT8_BLOCK) {
    const float scale = from_bfloat16(scales[first / INT8_BLOCK]);
    for (int i = first; i < first + INT8_BLOCK; ++i) buffer[i] = static_cast<float>(elements[i]) * scale;
  }
  return buffer;
}

void write_int8(const Row& row, std::int64_t start, int count, float* __restrict values) {
  auto* __restrict elements = place<std::int8_t>(row.exp_avg, start);
  std::uint16_t* scales = scales_of(row, start);
  for (int i = count; i % INT8_BLOCK != 0; ++i) values[i] = 0.0f;  // padding must not raise the block's maximum
  for (int first = 0; first < count; first += INT8_BLOCK) {
    // Compared as integers, magnitudes have the order of the floats and NaN is the largest, so no maximum loses a NaN.
    std::int32_t largest = 0;
    for (int i = first; i < first + INT8_BLOCK; ++i)
      largest = std::max(largest, static_cast<std::int32_t>(as_bits(values[i]) & 0x7FFFFFFF));
    const bool finite = largest < 0x7F800000;
    std::uint16_t scale_bits = finite ? to_bfloat16(as_float(largest) * ONE_127TH) : 0;
    const float scale = from_bfloat16(scale_bits);
    const float inverse = scale < SMALLEST_SCALE ? 0.0f : 1.0f / scale;
    if (scale < SMALLEST_SCALE) scale_bits = 0;
    for (int i = first; i < first + INT8_BLOCK; ++i) {
      float quantised = (finite ? values[i] : 0.0f) * inverse;
      quantised = (quantised + ROUNDING) - ROUNDING;
      quantised = std::min(std::max(quantised, -127.0f), 127.0f);
      elements[i] = static_cast<std::int8_t>(static_cast<std::int32_t>(quantised));
    }
    scales[first / INT8_BLOCK] = finite ? scale_bits : 0x7FC0;
  }
}

// float32 values from a bfloat16 parameter and its remainder.
template <class Remainder>
float* join(const Row& row, std::int64_t start, int count, float* __restrict buffer) {
  constexpr int UNIT = sizeof(Remainder) == 1 ? 256 : 1;
  const auto* __restrict upper = place<std::uint16_t>(row.param, start);
  const auto* __restrict remainder = place<Remainder>(row.master, start);
  for (int i = 0; i < count; ++i)
    buffer[i] = as_float((static_cast<std::uint32_t>(upper[i]) << 16) + static_cast<std::uint32_t>(remainder[i] * UNIT));
  return buffer;
}

template <class Remainder>
void split(const Row& row, std::int64_t start, int count, const float* __restrict values) {
  constexpr bool SHORT = sizeof(Remainder) == 1;
  auto* __restrict upper = place<std::uint16_t>(row.param, start);
  auto* __restrict remainder = place<Remainder>(row.master, start);
  for (int i = 0; i < count; ++i) {
    // One NaN: rounding 0x7FFFFFFF up would carry into the sign and give -0.
    std::uint32_t bits = values[i] == values[i] ? as_bits(values[i]) : 0x7FC00000;
    if (SHORT) bits = (bits + 0x80) & 0xFFFFFF00;
    const std::uint32_t hi = (bits + 0x8000) >> 16;
    const auto lower = static_cast<std::int32_t>(bits - (hi << 16));
    upper[i] = static_cast<std::uint16_t>(hi);
    remainder[i] = static_cast<Remainder>(SHORT ? lower >> 8 : lower);
  }
}

float* read_master(const Work& work, const Row& row, std::int64_t start, int count, float* buffer) {
  if (work.master == SPLIT32) return join<std::int16_t>(row, start, count, buffer);
  if (work.master == SPLIT24) return join<std::int8_t>(row, start, count, buffer);
  if (work.master == FLOAT32) return place<float>(row.master, start);
  return read(work.param, row.param, start, count, buffer);
}

void write_master(const Work& work, const Row& row, std::int64_t start, int count, const float* values) {
  if (work.master == SPLIT32) return split<std::int16_t>(row, start, count, values);
  if (work.master == SPLIT24) return split<std::int8_t>(row, start, count, values);
  if (work.param == BFLOAT16) write_bfloat16(row.param, start, count, values);
}

// Sign of the interpolation c, 0 at ±0; NaN if c is NaN or ±inf, for which c - c is NaN.
inline float sign_or_nan(float g, float m, const Group& group) {
  const float c = m * group.beta1 + g * group.one_minus_beta1;
  return ((c > 0.0f ? 1.0f : 0.0f) - (c < 0.0f ? 1.0f : 0.0f)) + (c - c);
}

// The equations; if `begin`, a momentum that is NaN has not begun and takes the gradient.
void update(const Work& work, const Row& row, int count, const float* __restrict grads, float* __restrict params,
            float* __restrict exp_avgs) {
  const Group group = work.groups[row.group];
  const float multiplier = work.multipliers[0] * group.sign, second = work.multipliers[1], caution = work.cautions != nullptr ? work.cautions[row.slot] : 1.0f;
  const bool begin = work.begin != 0, cautious = work.cautions != nullptr;
  for (int i = 0; i < count; ++i) {
    const float g = grads[i] * multiplier * second, p = params[i];
    const float m = begin && exp_avgs[i] != exp_avgs[i] ? g : exp_avgs[i];
    float direction = sign_or_nan(g, m, group);
    if (cautious) direction *= direction * g > 0.0f ? caution : 0.0f;
    params[i] = p - (direction + p * group.weight_decay) * group.lr;
    exp_avgs[i] = m * group.beta2 + g * group.one_minus_beta2;
  }
}

std::int64_t agreeing(const Work& work, const Row& row, int count, const float* grads, const float* exp_avgs) {
  const Group group = work.groups[row.group];
  const float multiplier = work.multipliers[0] * group.sign, second = work.multipliers[1];
  int found = 0;
  for (int i = 0; i < count; ++i) {
    const float g = grads[i] * multiplier * second;
    const float m = work.begin != 0 && exp_avgs[i] != exp_avgs[i] ? g : exp_avgs[i];
    found += sign_or_nan(g, m, group) * g > 0.0f;
  }
  return found;
}

// Updates or counts `count` elements, at most BLOCK, from `start`, a multiple of INT8_BLOCK.
std::int64_t take_block(const Work& work, const Row& row, std::int64_t start, int count) {
  alignas(64) float param_buffer[BLOCK], grad_buffer[BLOCK], exp_avg_buffer[BLOCK];
  const float* g = read(work.grad, row.grad, start, count, grad_buffer);
  float* m = work.momentum == INT8 ? read_int8(row, start, count, exp_avg_buffer)
                                   : read(work.momentum, row.exp_avg, start, count, exp_avg_buffer);
  if (work.counts != nullptr) return agreeing(work, row, count, g, m);
  float* p = read_master(work, row, start, count, param_buffer);
  update(work, row, count, g, p, m);
  write_master(work, row, start, count, p);
  if (work.momentum == INT8) write_int8(row, start, count, m);
  if (work.momentum == BFLOAT16) write_bfloat16(row.exp_avg, start, count, m);
  return 0;
}

void take_chunk(const Work& work, const Row& row, std::int64_t start) {
  const std::int64_t end = std::min(start + CHUNK, row.numel);
  std::int64_t agree = 0;
  for (; start < end; start += BLOCK)
    agree += take_block(work, row, start, static_cast<int>(std::min<std::int64_t>(BLOCK, end - start)));
  // Chunks of one row may be on several threads. Relaxed order is enough: the joins in lion_step publish the sums.
  if (work.counts != nullptr)
    reinterpret_cast<std::atomic<std::int64_t>*>(work.counts)[row.slot].fetch_add(agree, std::memory_order_relaxed);
}
static_assert(sizeof(std::atomic<std::int64_t>) == sizeof(std::int64_t), "counts are plain integers for Python");

}  // namespace

// Takes every chunk of every row, split into `threads` equal runs of consecutive chunks. An element depends on no other
// but for the scale of its int8 block, so the number of threads changes no bit.
extern "C" void lion_step(const Work* given) {
  const Work& work = *given;
  std::vector<std::int64_t> first(work.num_rows + 1, 0);
  for (std::int64_t i = 0; i < work.num_rows; ++i) first[i + 1] = first[i] + (work.rows[i].numel + CHUNK - 1) / CHUNK;
  const std::int64_t chunks = first.back();
  auto share = [&](std::int64_t chunk, std::int64_t end) {
    auto row = std::upper_bound(first.begin(), first.end(), chunk) - first.begin() - 1;
    for (; chunk < end; ++chunk) {
      while (chunk >= first[row + 1]) ++row;
      take_chunk(work, work.rows[row], (chunk - first[row]) * CHUNK);
    }
  };
  const auto runs = std::max<std::int64_t>(1, std::min<std::int64_t>(work.threads, chunks));
  std::vector<std::thread> others;
  for (std::int64_t i = 1; i < runs; ++i) {
    const std::int64_t begin = chunks * i / runs, end = chunks * (i + 1) / runs;
    try {
      others.emplace_back(share, begin, end);
    } catch (const std::system_error&) {  // no thread could be started: this one does the work
      share(begin, end);
    }
  }
  share(0, chunks / runs);
  for (auto& other : others) other.join();
}
