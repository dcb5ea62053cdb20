// SPDX-License-Identifier: Apache-2.0
// Mixes 64-bit words into one hash.
#pragma once

#include <cstdint>

#include "spec/tree.h"

namespace optree {

// The finaliser of MurmurHash3 (Appleby, public domain constants): every input bit affects every
// output bit.
constexpr std::uint64_t mix(std::uint64_t x) noexcept {
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdULL;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53ULL;
    x ^= x >> 33;
    return x;
}

// Depends on the order. Where the machine supports it, this is one 128-bit product whose halves are
// added without carry. Its latency is a third of that of `mix`, and the chain over all nodes waits
// for it (spec_hash in benchmarks/optree).
constexpr std::uint64_t combine(std::uint64_t seed, std::uint64_t value) noexcept {
#if defined(__SIZEOF_INT128__)
    __extension__ using Wide = unsigned __int128;
    const Wide product = Wide{seed ^ 0x9e3779b97f4a7c15ULL} * (value ^ 0xd6e8feb86659fd93ULL);
    return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
#else
    return mix(seed * 0x9e3779b97f4a7c15ULL + value + 0x7f4a7c15ULL);
#endif
}

// The hash of the shape alone: kinds, arities and counts without the payloads.
inline std::uint64_t hash_node(std::uint64_t seed, const Node& node) noexcept {
    seed = combine(seed, (std::uint64_t{static_cast<std::uint32_t>(node.kind)} << 32) | node.arity);
    return combine(seed, (std::uint64_t{node.leaves} << 32) | node.leaf_end);
}

}  // namespace optree
