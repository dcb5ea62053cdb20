// SPDX-License-Identifier: Apache-2.0
// Equality, hash and the prefix order of structures.
#pragma once

#include "walk/spec_object.h"

namespace optree {

bool spec_equal(const SpecObject& a, const SpecObject& b);
Py_hash_t spec_hash(SpecObject& spec);
// Whether `a` is a prefix of `b`. With `strict`, some leaf of `a` must also correspond to an
// internal node of `b`.
bool spec_is_prefix(const SpecObject& a, const SpecObject& b, bool strict);

// For two layouts with equal key sets: index_in_b[i] is the child of `b` with key i of `a`. Returns
// false if the sets differ. May run Python code.
bool align_keys(const KeyLayout* a, const KeyLayout* b, Stack<std::uint32_t>& index_in_b);

inline bool is_mapping_pair(Kind a, Kind b) noexcept { return is_mapping(a) && is_mapping(b); }

}  // namespace optree
