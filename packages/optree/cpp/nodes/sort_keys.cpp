// SPDX-License-Identifier: Apache-2.0
#include "nodes/sort_keys.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "support/errors.h"
#include "support/object_stack.h"

namespace optree {
namespace {

struct Keyed {
    std::uint64_t prefix;  // decides the order of most pairs without reading the key
    std::uint32_t index;
};
using KeyedKeys = Scratch<Keyed, 64>;

const unsigned char* bytes_of(PyObject* text) noexcept {
    return static_cast<const unsigned char*>(PyUnicode_DATA(text));
}
std::size_t length_of(PyObject* text) noexcept {
    return static_cast<std::size_t>(PyUnicode_GET_LENGTH(text));
}

// Eight bytes starting at `skip` as a big-endian number, padded with zeros. It orders like the
// bytes.
std::uint64_t byte_prefix(PyObject* text, std::size_t skip) noexcept {
    const unsigned char* bytes = bytes_of(text) + skip;
    const std::size_t length = length_of(text) - skip;
    std::uint64_t prefix = 0;
    for (std::size_t i = 0; i < 8 && i < length; ++i)
        prefix |= std::uint64_t{bytes[i]} << (56 - 8 * i);
    return prefix;
}

bool bytes_less(PyObject* a, PyObject* b) noexcept {
    const std::size_t length_a = length_of(a);
    const std::size_t length_b = length_of(b);
    const int order = std::memcmp(bytes_of(a), bytes_of(b), std::min(length_a, length_b));
    return order != 0 ? order < 0 : length_a < length_b;
}

// The number of leading bytes that all keys share.
std::size_t common_prefix(PyObject* const* keys, std::size_t size) noexcept {
    const unsigned char* first = bytes_of(keys[0]);
    std::size_t common = length_of(keys[0]);
    for (std::size_t i = 1; i < size && common != 0; ++i) {
        common = std::min(common, length_of(keys[i]));
        const unsigned char* other = bytes_of(keys[i]);
        if (std::memcmp(first, other, common) == 0) continue;
        common =
            static_cast<std::size_t>(std::mismatch(first, first + common, other).first - first);
    }
    return common;
}

// Fewer keys than this are sorted by insertion.
constexpr std::size_t kFew = 24;

template <class Less>
Plain sort_by(KeyedKeys& keyed, KeyOrder& order, Less&& less) {
    const std::size_t size = keyed.size();
    if (std::is_sorted(keyed.begin(), keyed.end(), less)) return Plain::in_order;
    if (size <= kFew) {
        for (Keyed* at = keyed.begin() + 1; at != keyed.end(); ++at) {
            const Keyed moved = *at;
            Keyed* hole = at;
            for (; hole != keyed.begin() && less(moved, hole[-1]); --hole) *hole = hole[-1];
            *hole = moved;
        }
    } else {
        std::sort(keyed.begin(), keyed.end(), less);
    }
    order.set_size(0);
    order.reserve(size);
    for (const Keyed& key : keyed) order.push_unchecked(key.index);
    return Plain::permuted;
}

// Two characters of text of any width, padded with zeros. The number orders like the code points.
std::uint64_t text_prefix(PyObject* text) noexcept {
    std::uint64_t prefix = 0;
    for (Py_ssize_t i = 0; i < 2 && i < PyUnicode_GET_LENGTH(text); ++i) {
        prefix |= std::uint64_t{PyUnicode_READ_CHAR(text, i)} << (32 - 32 * i);
    }
    return prefix;
}

// If all texts have one byte per character, bytes order like code points.
Plain sort_texts(PyObject* const* keys, std::size_t size, KeyOrder& order) {
    bool bytes = true;
    for (std::size_t i = 0; i < size; ++i) {
        if (!PyUnicode_CheckExact(keys[i])) return Plain::not_plain;
        bytes = bytes && PyUnicode_KIND(keys[i]) == PyUnicode_1BYTE_KIND;
    }
    const std::size_t skip = bytes && size > kFew ? common_prefix(keys, size) : 0;
    KeyedKeys keyed;
    keyed.reserve(size);
    for (std::uint32_t i = 0; i < size; ++i) {
        keyed.push_unchecked({bytes ? byte_prefix(keys[i], skip) : text_prefix(keys[i]), i});
    }
    return sort_by(keyed, order, [keys, bytes](const Keyed& a, const Keyed& b) {
        if (a.prefix != b.prefix) return a.prefix < b.prefix;
        return bytes ? bytes_less(keys[a.index], keys[b.index])
                     : PyUnicode_Compare(keys[a.index], keys[b.index]) < 0;
    });
}

Plain sort_small_ints(PyObject* const* keys, std::size_t size, KeyOrder& order) {
    KeyedKeys keyed;
    keyed.reserve(size);
    for (std::uint32_t i = 0; i < size; ++i) {
        if (!PyLong_CheckExact(keys[i])) return Plain::not_plain;
        int overflow = 0;
        const long long value = PyLong_AsLongLongAndOverflow(keys[i], &overflow);
        if (overflow != 0) return Plain::not_plain;
        keyed.push_unchecked({static_cast<std::uint64_t>(value) ^ (std::uint64_t{1} << 63), i});
    }
    return sort_by(keyed, order,
                   [](const Keyed& a, const Keyed& b) { return a.prefix < b.prefix; });
}

std::size_t bytes_of_large_int(PyObject* key) noexcept {
    const Ref answer =
        Ref::steal(calling_python([&] { return PyObject_CallMethod(key, "__sizeof__", nullptr); }));
    const std::size_t bytes = answer ? PyLong_AsSize_t(answer.get()) : static_cast<std::size_t>(-1);
    if (PyErr_Occurred()) PyErr_Clear();
    return bytes;
}

Ref copy_list(PyObject* list) { return checked(PyList_GetSlice(list, 0, PyList_GET_SIZE(list))); }

// Sorts in place. Returns false if the elements cannot be ordered (TypeError, cleared).
bool try_sort(PyObject* list) {
    if (calling_python([&] { return PyList_Sort(list); }) == 0) return true;
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw PythonError{};
    PyErr_Clear();
    return false;
}

// "module.qualname" of the key's class.
Ref class_name(PyObject* key) {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(key));
    Ref module = attribute_of(type, "__module__");
    Ref qualname = attribute_of(type, "__qualname__");
    return formatted("%S.%S", module.get(), qualname.get());
}

}  // namespace

bool is_atomic_rest(PyObject* key, int depth) noexcept {
    constexpr int kMaxDepth = 4;
    if (key == Py_None || PyBool_Check(key) || PyFloat_CheckExact(key) || PyBytes_CheckExact(key) ||
        PyComplex_CheckExact(key)) {
        return true;
    }
    if (!PyTuple_CheckExact(key) || depth == kMaxDepth) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(key); ++i) {
        PyObject* item = PyTuple_GET_ITEM(key, i);
        if (!is_str_or_int(item) && !is_atomic_rest(item, depth + 1)) return false;
    }
    return true;
}

bool same_atomic(PyObject* a, PyObject* b) noexcept {
    if (a == b) return true;
    if (Py_TYPE(a) != Py_TYPE(b)) return false;
    if (PyUnicode_CheckExact(a)) {
        const auto kind = PyUnicode_KIND(a);
        const Py_ssize_t length = PyUnicode_GET_LENGTH(a);
        return PyUnicode_KIND(b) == kind && PyUnicode_GET_LENGTH(b) == length &&
               std::memcmp(PyUnicode_DATA(a), PyUnicode_DATA(b),
                           static_cast<std::size_t>(length) * static_cast<std::size_t>(kind)) == 0;
    }
    if (PyLong_CheckExact(a) || PyBytes_CheckExact(a)) {
        return PyObject_RichCompareBool(a, b, Py_EQ) == 1;
    }
    const auto same_number = [](double x, double y) {
        return x == y && std::signbit(x) == std::signbit(y);
    };
    if (PyFloat_CheckExact(a)) return same_number(PyFloat_AS_DOUBLE(a), PyFloat_AS_DOUBLE(b));
    if (PyComplex_CheckExact(a)) {
        return same_number(PyComplex_RealAsDouble(a), PyComplex_RealAsDouble(b)) &&
               same_number(PyComplex_ImagAsDouble(a), PyComplex_ImagAsDouble(b));
    }
    if (!PyTuple_CheckExact(a) || PyTuple_GET_SIZE(a) != PyTuple_GET_SIZE(b)) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(a); ++i) {
        if (!same_atomic(PyTuple_GET_ITEM(a, i), PyTuple_GET_ITEM(b, i))) return false;
    }
    return true;
}

std::size_t bytes_of_key(PyObject* key) noexcept {
    if (PyUnicode_CheckExact(key)) {
        return sizeof(PyUnicodeObject) + static_cast<std::size_t>(PyUnicode_GET_LENGTH(key)) *
                                             static_cast<std::size_t>(PyUnicode_KIND(key));
    }
    if (PyTuple_CheckExact(key)) {
        std::size_t bytes = sizeof(PyTupleObject);
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(key); ++i) {
            bytes += sizeof(PyObject*) + bytes_of_key(PyTuple_GET_ITEM(key, i));
        }
        return bytes;
    }
    if (PyBytes_CheckExact(key)) {
        return sizeof(PyBytesObject) + static_cast<std::size_t>(PyBytes_GET_SIZE(key));
    }
    if (PyLong_CheckExact(key)) {
        int overflow = 0;
        (void)PyLong_AsLongLongAndOverflow(key, &overflow);
        if (overflow != 0) return bytes_of_large_int(key);
    }
    return 2 * sizeof(PyFloatObject);
}

Ref sorted_list(PyObject* list) {
    Ref plain = copy_list(list);
    if (try_sort(plain.get())) return plain;
    const Py_ssize_t size = PyList_GET_SIZE(list);
    ObjectStack collected;  // class_name() runs Python code, which must not see a list with holes
    for (Py_ssize_t i = 0; i < size; ++i) {
        const Ref key = checked(compat::list_item(list, i));
        const Ref name = class_name(key.get());
        collected.push_owned(checked(PyTuple_Pack(2, name.get(), key.get())).release());
    }
    const Ref pairs = collected.into_list();
    if (!try_sort(pairs.get())) return copy_list(list);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(pairs.get()); ++i) {
        PyObject* pair = PyList_GET_ITEM(pairs.get(), i);
        collected.push(PyTuple_CheckExact(pair) && PyTuple_GET_SIZE(pair) == 2
                           ? PyTuple_GET_ITEM(pair, 1)
                           : Py_None);
    }
    return collected.into_list();
}

Plain sort_plain_keys(PyObject* const* keys, std::size_t size, KeyOrder& order) {
    if (size < 2) return size == 0 || is_atomic(keys[0]) ? Plain::in_order : Plain::not_plain;
    const Plain plain = sort_texts(keys, size, order);
    return plain != Plain::not_plain ? plain : sort_small_ints(keys, size, order);
}

bool strictly_increasing(PyObject* const* keys, std::size_t size) noexcept {
    if (size == 0) return true;
    PyTypeObject* type = Py_TYPE(keys[0]);
    if (!is_str_or_int(keys[0])) return false;
    for (std::size_t i = 1; i < size; ++i) {
        PyObject* before = keys[i - 1];
        PyObject* key = keys[i];
        if (Py_TYPE(key) != type) return false;
        const bool bytes = type == &PyUnicode_Type &&
                           PyUnicode_KIND(before) == PyUnicode_1BYTE_KIND &&
                           PyUnicode_KIND(key) == PyUnicode_1BYTE_KIND;
        if (!(bytes ? bytes_less(before, key)
                    : PyObject_RichCompareBool(before, key, Py_LT) == 1)) {
            return false;
        }
    }
    return true;
}

namespace {

// Other code can reach the list through gc.get_objects().
[[noreturn]] OPTREE_COLD void raise_changed() {
    raise(PyExc_RuntimeError, "the list of keys changed while it was sorted");
}

}  // namespace

bool sort_keys(PyObject* const* keys, std::size_t size, KeyOrder& order) {
    const Plain plain = sort_plain_keys(keys, size, order);
    if (plain != Plain::not_plain) return plain == Plain::permuted;

    Ref list = checked(PyList_New(static_cast<Py_ssize_t>(size)));
    for (std::size_t i = 0; i < size; ++i) {
        PyList_SET_ITEM(list.get(), static_cast<Py_ssize_t>(i), compat::new_ref(keys[i]));
    }
    const Ref sorted = sorted_list(list.get());
    list = nullptr;
    if (PyList_GET_SIZE(sorted.get()) != static_cast<Py_ssize_t>(size)) raise_changed();
    // Maps the key objects back to their indices. An object that occurs twice keeps its order.
    std::vector<std::pair<PyObject*, std::uint32_t>> where(size);
    for (std::uint32_t i = 0; i < size; ++i) where[i] = {keys[i], i};
    std::sort(where.begin(), where.end());
    std::vector<bool> taken(size, false);
    order.set_size(0);
    order.reserve(size);
    bool permuted = false;
    for (std::uint32_t child = 0; child < size; ++child) {
        PyObject* key = PyList_GET_ITEM(sorted.get(), static_cast<Py_ssize_t>(child));
        auto at = std::lower_bound(where.begin(), where.end(), std::pair{key, std::uint32_t{0}});
        while (at != where.end() && taken[at->second]) ++at;
        if (at == where.end() || at->first != key) raise_changed();
        taken[at->second] = true;
        order.push_unchecked(at->second);
        permuted = permuted || at->second != child;
    }
    return permuted;
}

}  // namespace optree
