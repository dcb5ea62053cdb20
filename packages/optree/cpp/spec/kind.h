// SPDX-License-Identifier: Apache-2.0
// The kinds of nodes in a tree, and the facts that follow from their rows in kinds.def.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iterator>

namespace optree {

// As wide as the other members of a node, which therefore has no padding.
enum class Kind : std::uint32_t {
#define OPTREE_KIND(value, name, ...) name = value,
#define OPTREE_VALUE(value, name, ...) name = value,
#include "spec/kinds.def"
};

// The content of a payload slot: an object or null. Each has a class of the same name in
// nodes/slots.h.
enum class SlotType : std::uint8_t {
    Registered,   // the registration of a custom class
    Metadata,     // the metadata that its flatten function returned
    Entries,      // the names of its children, a tuple; null for none
    Keys,         // the key layout of a mapping that follows the dict mode
    OrderedKeys,  // the key layout of a mapping with its own order
    Class,        // the class of the node
    Factory,      // the default factory of a mapping
    Maxlen,       // an int, null for None
};

// The properties of a kind that the walks need.
struct KindFacts {
    std::uint8_t value;
    const char* name;
    const char* python_name;
    bool is_node;                 // false for numbers that no node uses
    std::uint8_t slots = 0;       // number of payload slots that a node owns in the payload table
    std::int8_t keys = -1;        // index of the slot with the key layout
    std::int8_t registered = -1;  // index of the slot with the registration
    bool follows_dict_mode = false;

    constexpr KindFacts(int number, const char* its_name, const char* in_python, bool node,
                        std::initializer_list<SlotType> types = {})
        : value(static_cast<std::uint8_t>(number)),
          name(its_name),
          python_name(in_python),
          is_node(node) {
        for (const SlotType type : types) {
            const auto index = static_cast<std::int8_t>(slots++);
            if (type == SlotType::Keys || type == SlotType::OrderedKeys) keys = index;
            if (type == SlotType::Registered) registered = index;
            if (type == SlotType::Keys) follows_dict_mode = true;
        }
    }
};

namespace kinds {
using enum SlotType;
inline constexpr KindFacts facts[] = {
#define OPTREE_KIND(value, name, python_name, cls, ...) \
    {value, #name, #python_name, true, {__VA_ARGS__}},
#define OPTREE_VALUE(value, name, python_name) {value, #name, #python_name, false},
#include "spec/kinds.def"
};
}  // namespace kinds

inline constexpr int kNumKinds = static_cast<int>(std::size(kinds::facts));

static_assert([] {
    for (int i = 0; i < kNumKinds; ++i) {
        if (kinds::facts[i].value != i) return false;
    }
    return true;
}());

constexpr const KindFacts& facts_of(Kind kind) noexcept {
    return kinds::facts[static_cast<std::size_t>(kind)];
}

constexpr bool is_leaf(Kind kind) noexcept { return kind == Kind::leaf; }
inline constexpr Kind kLeafKind = Kind::leaf;

constexpr std::size_t slot_count(Kind kind) noexcept { return facts_of(kind).slots; }
constexpr bool is_mapping(Kind kind) noexcept { return facts_of(kind).keys >= 0; }
// Whether nodes of a kind without children differ only in their position.
constexpr bool are_alike_if_empty(Kind kind) noexcept {
    return slot_count(kind) == (is_mapping(kind) ? 1 : 0);
}
constexpr bool is_custom(Kind kind) noexcept { return facts_of(kind).registered >= 0; }

}  // namespace optree
