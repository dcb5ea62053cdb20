// SPDX-License-Identifier: Apache-2.0
// Whether two trees have the same shape. Payloads are ignored.
#pragma once

#include <cstring>

#include "spec/tree.h"

namespace optree {

// Slots are in node order in every tree, so trees of the same shape have bytewise equal node
// tables.
inline bool same_shape(const Tree& a, const Tree& b) noexcept {
    return a.leaves == b.leaves && a.nodes.size() == b.nodes.size() &&
           (a.nodes.empty() ||
            std::memcmp(a.nodes.data(), b.nodes.data(), a.nodes.size() * sizeof(Node)) == 0);
}

}  // namespace optree
