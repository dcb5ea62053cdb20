// SPDX-License-Identifier: Apache-2.0
#include "nodes/sort_keys.h"

#include <algorithm>
#include <cstring>

#include "support/object_stack.h"

namespace optree {
namespace {

struct Keyed {
    std::uint64_t prefix;  // orders most pairs without touching the string
    std::uint32_t index;
};

// The first eight bytes as a big-endian number, zero filled: orders like the bytes do.
std::uint64_t byte_prefix(PyObject* text) noexcept {
    const auto* bytes = static_cast<const unsigned char*>(PyUnicode_DATA(text));
    const Py_ssize_t length = std::min<Py_ssize_t>(PyUnicode_GET_LENGTH(text), 8);
    std::uint64_t prefix = 0;
    for (Py_ssize_t i = 0; i < length; ++i) prefix |= std::uint64_t{bytes[i]} << (56 - 8 * i);
    return prefix;
}

bool bytes_less(PyObject* a, PyObject* b) noexcept {
    const Py_ssize_t length_a = PyUnicode_GET_LENGTH(a);
    const Py_ssize_t length_b = PyUnicode_GET_LENGTH(b);
    const int order = std::memcmp(PyUnicode_DATA(a), PyUnicode_DATA(b),
                                  static_cast<std::size_t>(std::min(length_a, length_b)));
    return order != 0 ? order < 0 : length_a < length_b;
}

bool finish(const std::vector<Keyed>& keyed, std::vector<std::uint32_t>& order) {
    order.resize(keyed.size());
    bool permuted = false;
    for (std::uint32_t child = 0; child < keyed.size(); ++child) {
        order[child] = keyed[child].index;
        permuted = permuted || keyed[child].index != child;
    }
    return permuted;
}

// Strings of one byte a character; bytes order like code points. Returns -1 where it can't be used.
int sort_byte_strings(PyObject* const* keys, std::size_t size, std::vector<std::uint32_t>& order) {
    bool ordered = true;
    for (std::size_t i = 0; i < size; ++i) {
        if (!PyUnicode_CheckExact(keys[i]) || PyUnicode_KIND(keys[i]) != PyUnicode_1BYTE_KIND) {
            return -1;
        }
    }
    for (std::size_t i = 1; i < size && ordered; ++i) ordered = bytes_less(keys[i - 1], keys[i]);
    if (ordered) return 0;
    std::vector<Keyed> keyed(size);
    for (std::uint32_t i = 0; i < size; ++i) keyed[i] = {byte_prefix(keys[i]), i};
    std::sort(keyed.begin(), keyed.end(), [keys](const Keyed& a, const Keyed& b) {
        return a.prefix != b.prefix ? a.prefix < b.prefix
                                    : bytes_less(keys[a.index], keys[b.index]);
    });
    return finish(keyed, order) ? 1 : 0;
}

// Exact ints that fit 64 bits. Returns -1 where it can't be used.
int sort_small_ints(PyObject* const* keys, std::size_t size, std::vector<std::uint32_t>& order) {
    if (!PyLong_CheckExact(keys[0])) return -1;
    std::vector<Keyed> keyed(size);
    for (std::uint32_t i = 0; i < size; ++i) {
        if (!PyLong_CheckExact(keys[i])) return -1;
        int overflow = 0;
        const long long value = PyLong_AsLongLongAndOverflow(keys[i], &overflow);
        if (overflow != 0) return -1;
        keyed[i] = {static_cast<std::uint64_t>(value) ^ (std::uint64_t{1} << 63), i};
    }
    std::sort(keyed.begin(), keyed.end(),
              [](const Keyed& a, const Keyed& b) { return a.prefix < b.prefix; });
    return finish(keyed, order) ? 1 : 0;
}

Ref copy_list(PyObject* list) { return checked(PyList_GetSlice(list, 0, PyList_GET_SIZE(list))); }

// Sorts in place; false if the elements can't be ordered (TypeError, swallowed).
bool try_sort(PyObject* list) {
    if (PyList_Sort(list) == 0) return true;
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw PythonError{};
    PyErr_Clear();
    return false;
}

// "module.qualname" of the key's class.
Ref class_name(PyObject* key) {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(key));
    Ref module = checked(PyObject_GetAttrString(type, "__module__"));
    Ref qualname = checked(PyObject_GetAttrString(type, "__qualname__"));
    return checked(PyUnicode_FromFormat("%S.%S", module.get(), qualname.get()));
}

}  // namespace

Ref sorted_list(PyObject* list) {
    Ref plain = copy_list(list);
    if (try_sort(plain.get())) return plain;
    const Py_ssize_t size = PyList_GET_SIZE(list);
    ObjectStack collected;  // no list with holes is visible while class_name() runs Python code
    for (Py_ssize_t i = 0; i < size; ++i) {
        PyObject* key = PyList_GET_ITEM(list, i);
        Ref name = class_name(key);
        collected.push_owned(checked(PyTuple_Pack(2, name.get(), key)).release());
    }
    const Ref pairs = collected.into_list();
    if (!try_sort(pairs.get())) return copy_list(list);
    Ref named = checked(PyList_New(size));
    for (Py_ssize_t i = 0; i < size; ++i) {
        PyObject* key = PyTuple_GET_ITEM(PyList_GET_ITEM(pairs.get(), i), 1);
        PyList_SET_ITEM(named.get(), i, compat::new_ref(key));
    }
    return named;
}

bool sort_keys(PyObject* const* keys, std::size_t size, std::vector<std::uint32_t>& order) {
    int fast = sort_byte_strings(keys, size, order);
    if (fast < 0) fast = sort_small_ints(keys, size, order);
    if (fast >= 0) return fast == 1;

    Ref list = checked(PyList_New(static_cast<Py_ssize_t>(size)));
    for (std::size_t i = 0; i < size; ++i) {
        PyList_SET_ITEM(list.get(), static_cast<Py_ssize_t>(i), compat::new_ref(keys[i]));
    }
    Ref sorted = sorted_list(list.get());
    // Back from the key objects to their indices; an object that stands twice keeps its order.
    std::vector<std::pair<PyObject*, std::uint32_t>> where(size);
    for (std::uint32_t i = 0; i < size; ++i) where[i] = {keys[i], i};
    std::sort(where.begin(), where.end());
    std::vector<bool> taken(size, false);
    order.resize(size);
    bool permuted = false;
    for (std::uint32_t child = 0; child < size; ++child) {
        PyObject* key = PyList_GET_ITEM(sorted.get(), static_cast<Py_ssize_t>(child));
        auto at = std::lower_bound(where.begin(), where.end(), std::pair{key, std::uint32_t{0}});
        while (taken[at->second]) ++at;
        taken[at->second] = true;
        order[child] = at->second;
        permuted = permuted || order[child] != child;
    }
    return permuted;
}

}  // namespace optree
