// philox.h: known answers of Random123 (tests/kat_vectors), as scalars and in vectors; normals
// against the standard library in double.
#define MICS_NAMESPACE mics_test
#include "expect.h"
#include "philox.h"

namespace {

using namespace mics_test;

struct Answer {
    uint32_t counter[4], key[2], words[4];
};

constexpr Answer kAnswers[] = {
    {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
     {0xffffffff, 0xffffffff},
     {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
     {0xa4093822, 0x299f31d0},
     {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
};

int64_t seed_of(const uint32_t* key) {
    return static_cast<int64_t>(uint64_t{key[1]} << 32 | key[0]);
}

template <class W> void check_answers() {
    for (const Answer& answer : kAnswers) {
        W c[1][4];
        // Bits above the low word must not matter.
        for (int k = 0; k < 4; ++k) c[0][k] = W{} + (0xabcdef0100000000u | answer.counter[k]);
        philox4x32(PhiloxKey(seed_of(answer.key)), c);
        for (int k = 0; k < 4; ++k) {
            uint64_t first;
            memcpy(&first, &c[0][k], sizeof first);
            expect_near("known answer", k, static_cast<uint32_t>(first), answer.words[k], 0);
        }
    }
}

double uniform(uint32_t word) { return ((word >> 8) + 0.5) / 16777216.0; }

void check_draws() {
    const int64_t seed = (int64_t{1} << 40) + 17, row = (int64_t{1} << 35) + 7, offset = 5,
                  first = 12;
    const PhiloxKey key(seed);
    UintVec words[4];
    Vec normals[4];
    words_of_draws(key, first, row, offset, words);
    normals_of_draws(key, first, row, offset, normals);
    for (int l = 0; l < kWidth; ++l) {
        const int draw = draw_of_lane(l);
        uint64_t c[1][4] = {{static_cast<uint64_t>(first + draw), static_cast<uint32_t>(row),
                             static_cast<uint64_t>(row) >> 32, static_cast<uint64_t>(offset)}};
        philox4x32(key, c);
        for (int k = 0; k < 4; ++k)
            expect_near("word", draw, words[k][l], static_cast<uint32_t>(c[0][k]), 0);
        for (int k = 0; k < 4; ++k) {
            const double radius = std::sqrt(-2.0 * std::log(uniform(words[k & 2][l])));
            const double angle = 2.0 * 3.14159265358979323846 * uniform(words[(k & 2) + 1][l]);
            const double wanted = radius * (k % 2 == 0 ? std::cos(angle) : std::sin(angle));
            const int column = 4 * draw + k;
            expect_near("normal", column, normals[column / kWidth][column % kWidth], wanted, 1e-6);
        }
    }
}

// Box-Muller over all words that matter: every exponent, both ends, every octant.
void check_box_muller() {
    for (uint64_t step = 0; step < 100003; ++step) {
        const uint32_t word = step < 600 ? static_cast<uint32_t>(step << 8)
                              : step < 1200
                                  ? static_cast<uint32_t>(0xffffffffu - ((step - 600) << 8))
                                  : static_cast<uint32_t>(step * 2654435761u);
        const UintVec lanes = UintVec{} + word;
        Vec cosine, sine;
        turn_of(lanes, cosine, sine);
        const double angle = 2.0 * 3.14159265358979323846 * uniform(word);
        const double radius = std::sqrt(-2.0 * std::log(uniform(word)));
        expect_near("radius", word, radius_of(lanes)[0], radius, 2e-7 * radius);
        expect_near("cosine", word, cosine[0], std::cos(angle), 3e-7);
        expect_near("sine", word, sine[0], std::sin(angle), 3e-7);
    }
}

}  // namespace

int main() {
    check_answers<uint64_t>();
    check_answers<WordVec>();
    check_draws();
    check_box_muller();
    return failures != 0;
}
