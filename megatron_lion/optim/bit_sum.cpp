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
  const void* lower;  // remainders of master weights whose upper halves are `data`; null if `data` is whole
  std::int64_t numel, start, columns, whole_columns, first, salt;
  std::int64_t* result;  // sum, and number of elements that are NaN or infinite; both are added to
  std::int32_t bytes, lower_bytes, exponent, threads;
};

// Shifts with the sign, as torch's int64 does.
inline std::uint64_t shifted(std::uint64_t value, int places) {
  return static_cast<std::uint64_t>(static_cast<std::int64_t>(value) >> places);
}

// The bits of an element, with its sign extended to 64 bits.
template <class Bits>
struct Whole {
  const Bits* data;
  std::int64_t operator()(std::int64_t i) const { return data[i]; }
};

// The same of a master weight in two parts, as precision.join_master joins them.
template <class Lower, int SHIFT>
struct Split {
  const std::uint16_t* data;
  const Lower* lower;
  std::int64_t operator()(std::int64_t i) const {
    const auto low = static_cast<std::uint32_t>(static_cast<std::int32_t>(lower[i])) << SHIFT;
    return static_cast<std::int32_t>((static_cast<std::uint32_t>(data[i]) << 16) + low);
  }
};

// Adds elements from `begin` to `end`, in runs of neighbours whose global indices are consecutive.
template <class Read>
void add_part(const Work& work, Read read, std::int64_t begin, std::int64_t end, std::uint64_t& sum, std::int64_t& bad) {
  const auto salt = static_cast<std::uint64_t>(work.salt);
  const std::int64_t exponent = work.exponent;
  const bool whole = work.columns == work.whole_columns;
  while (begin < end) {
    const std::int64_t local = work.start + begin;
    const std::int64_t row = whole ? 0 : local / work.columns, column = local - row * work.columns;
    const std::int64_t count = whole ? end - begin : std::min(end - begin, work.columns - column);
    const auto index = static_cast<std::uint64_t>(work.first + row * work.whole_columns + column);
    std::uint64_t total = 0;
    std::int64_t found = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t bits = read(begin + i);
      std::uint64_t mixed = (static_cast<std::uint64_t>(bits) ^ salt) * MIX;
      mixed = (mixed ^ shifted(mixed, 31)) * MIX2;
      total += (mixed ^ shifted(mixed, 29)) * (2 * (index + static_cast<std::uint64_t>(i)) + 1);
      found += (bits & exponent) == exponent;
    }
    sum += total;
    bad += found;
    begin += count;
  }
}

void add_all(const Work& work, std::int64_t begin, std::int64_t end, std::uint64_t& sum, std::int64_t& bad) {
  const auto* halves = static_cast<const std::uint16_t*>(work.data);
  if (work.lower_bytes == 2)
    add_part(work, Split<std::int16_t, 0>{halves, static_cast<const std::int16_t*>(work.lower)}, begin, end, sum, bad);
  else if (work.lower_bytes == 1)
    add_part(work, Split<std::int8_t, 8>{halves, static_cast<const std::int8_t*>(work.lower)}, begin, end, sum, bad);
  else if (work.bytes == 4)
    add_part(work, Whole<std::int32_t>{static_cast<const std::int32_t*>(work.data)}, begin, end, sum, bad);
  else
    add_part(work, Whole<std::int16_t>{static_cast<const std::int16_t*>(work.data)}, begin, end, sum, bad);
}

}  // namespace

// Splits the elements into equal parts, one a thread.
extern "C" void bit_sum(const Work* given) {
  const Work& work = *given;
  std::mutex alone;
  auto share = [&](std::int64_t begin, std::int64_t end) {
    std::uint64_t sum = 0;
    std::int64_t bad = 0;
    add_all(work, begin, end, sum, bad);
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
