// SPDX-License-Identifier: Apache-2.0
// The kinds of nodes a tree is made of.
#pragma once

#include <cstddef>
#include <cstdint>

namespace optree {

// The values are part of the pickle format and of the Python enum `PyTreeKind`: never renumber.
enum class Kind : std::uint8_t {
    custom = 0,
    leaf = 1,
    none = 2,
    tuple = 3,
    list = 4,
    dict = 5,
    namedtuple = 6,
    ordereddict = 7,
    defaultdict = 8,
    deque = 9,
    structseq = 10,
    frozendict = 11,
};

inline constexpr int kNumKinds = 12;

// How many payload slots a node of `kind` owns in the payload table.
//   dict, frozendict, ordereddict  [key layout]
//   defaultdict                    [key layout, default factory]
//   namedtuple, structseq          [class]
//   deque                          [maxlen, or null for None]
//   custom                         [registration, metadata, entries or null]
constexpr std::size_t slot_count(Kind kind) noexcept {
    switch (kind) {
        case Kind::custom: return 3;
        case Kind::defaultdict: return 2;
        case Kind::dict:
        case Kind::frozendict:
        case Kind::ordereddict:
        case Kind::namedtuple:
        case Kind::structseq:
        case Kind::deque: return 1;
        default: return 0;
    }
}

constexpr bool is_mapping(Kind kind) noexcept {
    return kind == Kind::dict || kind == Kind::ordereddict || kind == Kind::defaultdict ||
           kind == Kind::frozendict;
}

}  // namespace optree
