// SPDX-License-Identifier: Apache-2.0
// The documented total order of mapping keys.
#pragma once

#include <cstdint>

#include "support/ref.h"
#include "support/scratch.h"

namespace optree {

inline bool is_str_or_int(PyObject* key) noexcept {
    return PyUnicode_CheckExact(key) || PyLong_CheckExact(key);
}

// Whether the class of a key is exactly that of a number, str, bytes, None or a tuple of these. Such
// a key never changes and is in no cycle, and hashing or comparing it runs no Python code.
bool is_atomic_rest(PyObject* key, int depth = 0) noexcept;
inline bool is_atomic(PyObject* key) noexcept { return is_str_or_int(key) || is_atomic_rest(key); }

// Whether two atomic keys cannot be distinguished: they have the same class and are equal. Equal
// numbers with different representations (0.0 and -0.0) do not count.
bool same_atomic(PyObject* a, PyObject* b) noexcept;

// The approximate memory use of an atomic key in bytes. Python code may run if it is a large int.
std::size_t bytes_of_key(PyObject* key) noexcept;

// order[child] is the index of the child's key.
using KeyOrder = Scratch<std::uint32_t, 64>;

// The order of keys that can be compared without Python code: all exact str, or all exact int of 64
// bits.
enum class Plain : unsigned char { in_order, permuted, not_plain };
// Finds their order. Fills `order` if the result is Plain::permuted.
Plain sort_plain_keys(PyObject* const* keys, std::size_t size, KeyOrder& order);

// Whether the keys are all exact str or all exact int and each is less than the next, so that no
// two are equal. Runs no Python code and hashes nothing.
bool strictly_increasing(PyObject* const* keys, std::size_t size) noexcept;

// Finds the traversal order of `size` keys. They are ordered by Python's `<` if it is defined for
// all of them, else by class name and then `<`, else as given. Each attempt works on a copy. Errors
// other than TypeError propagate. Returns false, with `order` unspecified, if the keys are already
// in order.
bool sort_keys(PyObject* const* keys, std::size_t size, KeyOrder& order);

// A copy of a list, sorted by the same rules.
Ref sorted_list(PyObject* list);

}  // namespace optree
