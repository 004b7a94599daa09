// Token logits by look-up; lookup.py explains the letters, kernel.py compiles this file at first use.
//
//     T[s,g,k] = <h_g, C[s,g,k]>      z_v = b_v + sum over stages and groups of T[s,g,code of v]
//
// The vocabulary is cut into blocks. The codes of a stage that a block owns are a tile, one group after the other: the
// tables of a few groups stay in the first cache, or in registers, while the tile streams through.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>
#ifdef __AVX512VBMI__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t BLOCK = 2048;  // tokens; as in lookup.py
constexpr int64_t ROWS = 8;      // rows of hidden that are looked up together

typedef float Eight __attribute__((vector_size(32)));  // a number of each of eight rows

struct Head {  // as _Head in kernel.py
  int64_t vocab_size, num_stages, num_groups, num_slots, width, codebook_size, num_threads;
  const float* codebooks;  // (S, G, d/G, K)
  const void* codes;       // a tile: (slots, tokens); slots: G filled up to a multiple of 8
  const int16_t* places;   // where a tile's tokens stand in their block, rising
  const int64_t* starts;   // (S, blocks + 1): where the tiles start, in tokens
  const float* bias;       // (V)

  int64_t hidden_size() const { return num_groups * width; }
  int64_t num_tables() const { return num_stages * num_slots; }
  int64_t num_blocks() const { return (vocab_size + BLOCK - 1) / BLOCK; }
  int64_t block_size(int64_t block) const { return std::min(BLOCK, vocab_size - block * BLOCK); }
};

template <class Code>
struct Tile {
  int64_t size;
  const int16_t* places;
  const Code* codes;

  Tile(const Head& head, int64_t stage, int64_t block) {
    const int64_t* start = head.starts + stage * (head.num_blocks() + 1) + block;
    size = start[1] - start[0];
    places = head.places + start[0];
    codes = static_cast<const Code*>(head.codes) + start[0] * head.num_slots;
  }
};

// Numbers from one table to the next: a constant for bytes, which the compiler puts into addresses.
template <class Code>
inline int64_t stride(const Head& head) {
  return sizeof(Code) == 1 ? 256 : head.codebook_size;
}

// One table; it is zero for slots after the last group. Row is float, or Eight.
template <class Row>
void fill_table(const Head& head, int64_t slot, const Row* hidden, Row* table) {
  const int64_t stage = slot / head.num_slots, group = slot % head.num_slots, size = head.codebook_size;
  std::fill_n(table, size, Row{});
  if (group >= head.num_groups) return;
  const float* codebook = head.codebooks + (stage * head.num_groups + group) * head.width * size;
  for (int64_t j = 0; j < head.width; j++)
    for (int64_t k = 0; k < size; k++) table[k] += codebook[j * size + k] * hidden[group * head.width + j];
}

// A token's sum over eight groups; `step` from a group's code to that of the next.
template <class Row, class Code>
inline Row sum_eight(const Row* table, int64_t size, const Code* code, int64_t step) {
  return ((table[code[0]] + table[size + code[step]]) +
          (table[2 * size + code[2 * step]] + table[3 * size + code[3 * step]])) +
         ((table[4 * size + code[4 * step]] + table[5 * size + code[5 * step]]) +
          (table[6 * size + code[6 * step]] + table[7 * size + code[7 * step]]));
}

// Adds eight groups to the sums of a tile. Not inlined: a compiler that sees that the sums lie apart from the table
// makes vector gathers of this, and they take twice as long.
template <class Row, class Code>
__attribute__((noinline)) void add_eight(const Row* table, int64_t size, const Code* code, int64_t tokens, Row* sums) {
  if (sizeof(Code) == 1) size = 256;
  for (int64_t i = 0; i < tokens; i++) sums[i] += sum_eight(table, size, code + i, tokens);
}

template <class Row, class Code>
void block_logits(const Head& head, int64_t block, const Row* tables, Row* logits) {
  const int64_t size = stride<Code>(head);
  for (int64_t i = 0; i < head.block_size(block); i++) logits[i] = Row{} + head.bias[block * BLOCK + i];
  Row sums[BLOCK];
  for (int64_t stage = 0; stage < head.num_stages; stage++) {
    const Tile<Code> tile(head, stage, block);
    const Row* table = tables + stage * head.num_slots * size;
    std::fill_n(sums, tile.size, Row{});
    for (int64_t slot = 0; slot < head.num_slots; slot += 8)
      add_eight(table + slot * size, size, tile.codes + slot * tile.size, tile.size, sums);
    for (int64_t i = 0; i < tile.size; i++) logits[tile.places[i]] += sums[i];
  }
}

// Logits of at most as many rows as Row has numbers.
template <class Row, class Code>
void some_logits(const Head& head, int64_t num_rows, const float* hidden, float* scratch, float* logits) {
  const int64_t width = head.hidden_size();
  std::vector<Row> turned(width);
  for (int64_t r = 0; r < num_rows; r++)
    for (int64_t j = 0; j < width; j++) reinterpret_cast<float*>(&turned[j])[r] = hidden[r * width + j];
  Row* tables = reinterpret_cast<Row*>(scratch);
#pragma omp parallel num_threads(head.num_threads)
  {
#pragma omp for
    for (int64_t slot = 0; slot < head.num_tables(); slot++)
      fill_table(head, slot, turned.data(), tables + slot * stride<Code>(head));
#pragma omp for schedule(dynamic) nowait
    for (int64_t block = 0; block < head.num_blocks(); block++) {
      Row rows[BLOCK];
      block_logits<Row, Code>(head, block, tables, rows);
      for (int64_t r = 0; r < num_rows; r++)
        for (int64_t i = 0; i < head.block_size(block); i++)
          logits[r * head.vocab_size + block * BLOCK + i] = reinterpret_cast<const float*>(rows + i)[r];
    }
  }
}

#ifdef __AVX512VBMI__

// A row's tables of one stage, rounded up to whole steps above their least entries,
//
//     entry <= least + step * (q + 1), so that      sum of entries <= sum of least + step * (slots + sum of q)
//
// Slots go by fours whose q add up to a byte at most. As a few groups often range far wider than the others, the widest
// goes with the three narrowest, and so on.
struct Coarse {
  float step = 0, offset = 0;    // the bound: offset + step * (sum of q)
  float magnitude = 0;           // sum over groups of the greatest |entry|
  std::vector<int64_t> order;    // of slots, four after four
  std::vector<uint8_t> entries;  // q: (slots in that order, 256)
};

Coarse coarse_tables(const Head& head, const float* tables) {
  const int64_t slots = head.num_slots;
  Coarse coarse;
  std::vector<float> least(slots), range(slots);
  for (int64_t slot = 0; slot < slots; slot++) {
    float low = tables[slot * 256], high = low;
#pragma omp simd reduction(min : low) reduction(max : high)
    for (int64_t k = 0; k < head.codebook_size; k++) {
      low = std::min(low, tables[slot * 256 + k]);
      high = std::max(high, tables[slot * 256 + k]);
    }
    least[slot] = low, range[slot] = std::isfinite(high - low) ? high - low : 0;  // else best_token gives it up
    coarse.offset += low;
    coarse.magnitude += std::max(std::fabs(low), std::fabs(high));
  }
  std::vector<int64_t> sorted(slots);
  std::iota(sorted.begin(), sorted.end(), 0);
  std::sort(sorted.begin(), sorted.end(), [&](int64_t a, int64_t b) { return range[a] > range[b]; });
  float widest = 0, total = 0;
  for (int64_t four = 0; four < slots / 4; four++) {
    float sum = 0;
    for (int64_t i = 0; i < 4; i++) {
      coarse.order.push_back(sorted[i ? slots - 3 * four - i : four]);
      sum += range[coarse.order.back()];
    }
    widest = std::max(widest, sum), total += sum;
  }
  coarse.step = std::max({widest / 255, total / 65535, FLT_MIN}) * 1.0001f;  // a little more: this rounds as well
  coarse.offset += coarse.step * slots;
  coarse.entries.resize(slots * 256);
  for (int64_t i = 0; i < slots; i++) {
    const float *table = tables + coarse.order[i] * 256, low = least[coarse.order[i]], step = coarse.step;
    // The cast rounds down; the whole step a slot that `offset` includes makes an upper bound of it.
    for (int64_t k = 0; k < head.codebook_size; k++)
      coarse.entries[i * 256 + k] = static_cast<uint8_t>(static_cast<int32_t>((table[k] - low) / step));
  }
  return coarse;
}

// 64 look-ups in a table of 256 bytes that four registers hold.
inline __m512i look_up(const __m512i* table, const uint8_t* codes) {
  const __m512i code = _mm512_loadu_si512(codes);
  const __m512i low = _mm512_permutex2var_epi8(table[0], code, table[1]);
  const __m512i high = _mm512_permutex2var_epi8(table[2], code, table[3]);
  return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(code), high);
}

// Adds rounded entries to the sums of a tile.
void add_coarse(const Head& head, const Coarse& coarse, const Tile<uint8_t>& tile, uint16_t* sums) {
  for (int64_t slot = 0; slot < head.num_slots; slot += 4) {
    __m512i table[16];
    for (int64_t i = 0; i < 16; i++) table[i] = _mm512_loadu_si512(&coarse.entries[slot * 256 + i * 64]);
    const uint8_t* codes[4];
    for (int64_t i = 0; i < 4; i++) codes[i] = tile.codes + coarse.order[slot + i] * tile.size;
    for (int64_t v = 0; v < tile.size; v += 64) {
      __m512i four = look_up(table, codes[0] + v);
      for (int64_t i = 1; i < 4; i++) four = _mm512_add_epi8(four, look_up(table + 4 * i, codes[i] + v));
      const __m512i first = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(four));
      const __m512i second = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(four, 1));
      _mm512_storeu_si512(sums + v, _mm512_add_epi16(_mm512_loadu_si512(sums + v), first));
      _mm512_storeu_si512(sums + v + 32, _mm512_add_epi16(_mm512_loadu_si512(sums + v + 32), second));
    }
  }
}

// Upper bounds of a block's logits, and the greatest of them.
float block_bounds(const Head& head, int64_t block, const Coarse* stages, float* bounds) {
  const int64_t size = head.block_size(block);
  std::copy_n(head.bias + block * BLOCK, size, bounds);
  for (int64_t stage = 0; stage < head.num_stages; stage++) {
    const Tile<uint8_t> tile(head, stage, block);
    const float offset = stages[stage].offset, step = stages[stage].step;
    uint16_t sums[BLOCK] = {};
    add_coarse(head, stages[stage], tile, sums);
    if (tile.size == size)
      for (int64_t i = 0; i < size; i++) bounds[i] += offset + step * sums[i];
    else
      for (int64_t i = 0; i < tile.size; i++) bounds[tile.places[i]] += offset + step * sums[i];
  }
  float greatest = -INFINITY;
#pragma omp simd reduction(max : greatest)
  for (int64_t i = 0; i < size; i++) greatest = std::max(greatest, bounds[i]);
  return greatest;
}

float token_logit(const Head& head, const float* tables, int64_t token) {
  float logit = head.bias[token];
  for (int64_t stage = 0; stage < head.num_stages; stage++, tables += head.num_slots * 256) {
    const Tile<uint8_t> tile(head, stage, token / BLOCK);
    const int16_t* place = std::lower_bound(tile.places, tile.places + tile.size, token % BLOCK);
    if (place == tile.places + tile.size || *place != token % BLOCK) continue;
    float sum = 0;
    for (int64_t slot = 0; slot < head.num_slots; slot += 8)
      sum += sum_eight(tables + slot * 256, 256, tile.codes + slot * tile.size + (place - tile.places), tile.size);
    logit += sum;
  }
  return logit;
}

// The token of the greatest logit, the lowest id among equals; -1 where bounds are not finite or leave too many tokens.
int64_t best_token(const Head& head, const float* tables, const Coarse* stages, const float* bounds,
                   const float* greatest) {
  const int64_t promising = std::max_element(greatest, greatest + head.num_blocks()) - greatest;
  // The logit of the best bound is nearly the greatest one, so that few other bounds reach it.
  int64_t token = promising * BLOCK;
  while (bounds[token] < greatest[promising]) token++;
  float logit = token_logit(head, tables, token), magnitude = std::fabs(head.bias[token]);
  for (int64_t stage = 0; stage < head.num_stages; stage++) magnitude += stages[stage].magnitude;
  // A sum of n floats is wrong by n ε Σ|x| / 2 at most; this is more than all the sums here together.
  const float slack = 8 * FLT_EPSILON * (head.num_tables() + 16) * magnitude;
  if (!std::isfinite(logit - slack) || !std::isfinite(greatest[promising])) return -1;
  // A token whose bound stays below that logit, by more than the rounding of both, cannot win.
  std::vector<int64_t> others;
  for (int64_t block = 0; block < head.num_blocks(); block++) {
    if (greatest[block] < logit - slack) continue;
    for (int64_t v = block * BLOCK; v < block * BLOCK + head.block_size(block); v++)
      if (bounds[v] >= logit - slack) others.push_back(v);
  }
  // Looking up scattered tokens costs more than streaming tiles: with many of them all logits are faster.
  if (static_cast<int64_t>(others.size()) > 64 + head.vocab_size / 32) return -1;
  for (int64_t v : others) {
    const float other = token_logit(head, tables, v);
    if (other > logit || (other == logit && v < token)) logit = other, token = v;
  }
  return token;
}

void some_greedy(const Head& head, int64_t num_rows, const float* hidden, float* tables, float* bounds,
                 int64_t* tokens) {
  const int64_t num_tables = head.num_tables(), num_blocks = head.num_blocks();
  std::vector<Coarse> coarse(num_rows * head.num_stages);
  std::vector<float> greatest(num_rows * num_blocks);
#pragma omp parallel num_threads(head.num_threads)
  {
#pragma omp for
    for (int64_t i = 0; i < num_rows * num_tables; i++)
      fill_table(head, i % num_tables, hidden + i / num_tables * head.hidden_size(), tables + i * 256);
#pragma omp for
    for (int64_t i = 0; i < num_rows * head.num_stages; i++)
      coarse[i] = coarse_tables(head, tables + i * head.num_slots * 256);
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < num_blocks; block++)
      for (int64_t r = 0; r < num_rows; r++)
        greatest[r * num_blocks + block] =
            block_bounds(head, block, &coarse[r * head.num_stages], bounds + r * head.vocab_size + block * BLOCK);
#pragma omp for schedule(dynamic) nowait
    for (int64_t r = 0; r < num_rows; r++)
      tokens[r] = best_token(head, tables + r * num_tables * 256, &coarse[r * head.num_stages],
                             bounds + r * head.vocab_size, &greatest[r * num_blocks]);
  }
}

#endif

}  // namespace

// Logits (N, V) of hidden (N, d); scratch: (8 * tables * K), K = 256 for bytes.
extern "C" void lookup_logits(const Head* head, int64_t code_bytes, int64_t num_rows, const float* hidden,
                              float* scratch, float* logits) {
  for (int64_t r = 0; r < num_rows; r += ROWS) {
    const int64_t rows = std::min(ROWS, num_rows - r);
    auto run = rows == 1 ? (code_bytes == 1 ? some_logits<float, uint8_t> : some_logits<float, int16_t>)
                         : (code_bytes == 1 ? some_logits<Eight, uint8_t> : some_logits<Eight, int16_t>);
    run(*head, rows, hidden + r * head->hidden_size(), scratch, logits + r * head->vocab_size);
  }
}

#ifdef __AVX512VBMI__
// The argmax of what lookup_logits gives row by row, of codes in bytes; bounds: (8, V). Absent where it would be slow.
extern "C" void lookup_greedy(const Head* head, int64_t num_rows, const float* hidden, float* scratch, float* bounds,
                              int64_t* tokens) {
  for (int64_t r = 0; r < num_rows; r += ROWS)
    some_greedy(*head, std::min(ROWS, num_rows - r), hidden + r * head->hidden_size(), scratch, bounds, tokens + r);
}
#endif
