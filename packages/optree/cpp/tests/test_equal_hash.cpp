// SPDX-License-Identifier: Apache-2.0
// Comparison of shapes and the hash mixer.
#include "check.h"
#include "spec/equal.h"
#include "spec/hash.h"

namespace optree::testing {
namespace {

std::uint64_t hash(const Tree& tree) {
    std::uint64_t seed = tree.leaves;
    for (const Node& node : tree.nodes) seed = hash_node(seed, node);
    return seed;
}

void trees_are_the_same_shape_only_as_themselves() {
    for (const char* a : kTrees) {
        for (const char* b : kTrees) {
            const bool same = std::string(a) == b;
            CHECK_EQUAL(same_shape(tree_of(a), tree_of(b)), same);
            CHECK_EQUAL(hash(tree_of(a)) == hash(tree_of(b)), same);
        }
    }
}

void the_mixer_spreads_every_bit() {
    // Flipping one input bit flips about half of the output bits: between 16 and 48 of 64.
    for (int bit = 0; bit < 64; ++bit) {
        std::uint64_t changed = combine(1, 12345) ^ combine(1, 12345 ^ (std::uint64_t{1} << bit));
        int flips = 0;
        for (; changed != 0; changed &= changed - 1) ++flips;
        CHECK(flips >= 16 && flips <= 48);
    }
    CHECK(combine(combine(0, 1), 2) != combine(combine(0, 2), 1));
}

}  // namespace
}  // namespace optree::testing

int main() {
    optree::testing::trees_are_the_same_shape_only_as_themselves();
    optree::testing::the_mixer_spreads_every_bit();
    return 0;
}
