// CPU version of bit_sums.reference_sum: the same integers, in one pass, with the count of NaN and infinities.
//
// All arithmetic is modulo 2^64, so the order of the additions, and with it the number of threads, changes no bit.

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr std::uint64_t MIX = 0x9E3779B97F4A7C15, MIX2 = 0xBF58476D1CE4E5B9;
constexpr std::int64_t SHARE = 1 << 17;  // a thread for fewer elements costs more than it saves

// The argument of bit_sum; bit_sums.py has the same fields.
struct Work {
  const void* data;
  std::int64_t numel, start, columns, whole_columns, first, salt;
  std::int64_t* result;  // sum, and number of elements that are NaN or infinite; both are added to
  std::int32_t bytes, exponent, threads;
};

// Shifts with the sign, as torch's int64 does.
inline std::uint64_t shifted(std::uint64_t value, int places) {
  return static_cast<std::uint64_t>(static_cast<std::int64_t>(value) >> places);
}

// Adds a run of elements whose global indices are consecutive from `index`.
template <class Bits>
void add_run(const Bits* data, std::int64_t count, std::uint64_t index, std::uint64_t salt, Bits exponent,
             std::uint64_t& sum, std::int64_t& bad) {
  std::uint64_t total = 0;
  std::int64_t found = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const Bits bits = data[i];
    std::uint64_t mixed = (static_cast<std::uint64_t>(static_cast<std::int64_t>(bits)) ^ salt) * MIX;
    mixed = (mixed ^ shifted(mixed, 31)) * MIX2;
    total += (mixed ^ shifted(mixed, 29)) * (2 * (index + static_cast<std::uint64_t>(i)) + 1);
    found += (bits & exponent) == exponent;
  }
  sum += total;
  bad += found;
}

template <class Bits>
void add_part(const Work& work, std::int64_t begin, std::int64_t end, std::uint64_t& sum, std::int64_t& bad) {
  const auto* data = static_cast<const Bits*>(work.data);
  const bool whole = work.columns == work.whole_columns;
  while (begin < end) {
    const std::int64_t local = work.start + begin;
    const std::int64_t row = whole ? 0 : local / work.columns, column = local - row * work.columns;
    const std::int64_t count = whole ? end - begin : std::min(end - begin, work.columns - column);
    add_run<Bits>(data + begin, count, static_cast<std::uint64_t>(work.first + row * work.whole_columns + column),
                  static_cast<std::uint64_t>(work.salt), static_cast<Bits>(work.exponent), sum, bad);
    begin += count;
  }
}

}  // namespace

// Splits the elements into equal parts, one a thread.
extern "C" void bit_sum(const Work* given) {
  const Work& work = *given;
  std::mutex alone;
  auto share = [&](std::int64_t begin, std::int64_t end) {
    std::uint64_t sum = 0;
    std::int64_t bad = 0;
    if (work.bytes == 4)
      add_part<std::int32_t>(work, begin, end, sum, bad);
    else
      add_part<std::int16_t>(work, begin, end, sum, bad);
    const std::lock_guard<std::mutex> held(alone);
    work.result[0] = static_cast<std::int64_t>(static_cast<std::uint64_t>(work.result[0]) + sum);
    work.result[1] += bad;
  };
  const std::int64_t parts = std::max<std::int64_t>(1, std::min<std::int64_t>(work.threads, work.numel / SHARE));
  const std::int64_t size = work.numel / parts;  // the first part takes the rest
  const std::int64_t rest = work.numel - size * (parts - 1);
  std::vector<std::thread> others;
  for (std::int64_t i = 0; i + 1 < parts; ++i) {
    try {
      others.emplace_back(share, rest + i * size, rest + (i + 1) * size);
    } catch (const std::system_error&) {  // no thread could be started: this one does the work
      share(rest + i * size, rest + (i + 1) * size);
    }
  }
  share(0, rest);
  for (auto& other : others) other.join();
}
