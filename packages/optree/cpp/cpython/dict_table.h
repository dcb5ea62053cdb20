// SPDX-License-Identifier: Apache-2.0
// The entries of a dict, read and written in place. This is the only file that knows how CPython
// stores a dict. Callers check `trials.dict_table` first and otherwise use PyDict_Next and
// PyDict_SetItem.
//
// On trees of dicts, reading in place makes flatten 2x faster, and writing makes unflatten and map
// 2x to 3x faster (benchmarks/optree, nested dicts and dict of 10,000).
//
// Without the interpreter lock a dict is read inside a CriticalSection, in which no other thread
// writes. A new dict is filled before other threads can see it.
#pragma once

#include <cstring>
#include <utility>

#include "cpython/compat.h"

#if PY_VERSION_HEX >= 0x030B0000 && PY_VERSION_HEX < 0x03100000 && !defined(PYPY_VERSION) && \
    !defined(Py_REF_DEBUG)
#define OPTREE_DICT_ENTRIES 1
#else
#define OPTREE_DICT_ENTRIES 0
#endif

namespace optree {

// The entries of one dict, in insertion order.
struct DictEntries {
    char* first = nullptr;   // null if there are holes or the entries cannot be read
    std::size_t stride = 0;  // bytes from one entry to the next
    std::size_t key = 0;     // offset of the key in an entry; the value follows it, null in a hole
    char* holey = nullptr;   // the first entry of a table with holes

    explicit operator bool() const noexcept { return first != nullptr; }
    // Only for entries without holes.
    PyObject* first_key() const noexcept { return *reinterpret_cast<PyObject**>(first + key); }

    // The hash of a key, given its address in an entry. It is stored in the entry, or in the key if
    // that is a str.
    OPTREE_INLINE Py_hash_t hash(PyObject*& its_key) const noexcept {
        return key != 0 ? reinterpret_cast<Py_hash_t*>(&its_key)[-1] : PyObject_Hash(its_key);
    }

    // Calls visit(i, key, value) for the first `size` entries until it returns false. `visit` may
    // assign to `value`. Returns whether all entries were visited.
    template <class Visit>
    OPTREE_INLINE bool for_each(std::uint32_t size, Visit&& visit) const {
        // Each branch has a constant stride.
        return stride == 2 * sizeof(PyObject*) ? run<2>(size, visit) : run<3>(size, visit);
    }

    // The same for a table with holes, which are skipped. `visit` is passed by value: passing it by
    // reference would also keep its captures out of registers in `for_each`.
    template <class Visit>
    OPTREE_INLINE bool for_each_but_holes(std::uint32_t size, Visit visit) const {
        auto* entry = reinterpret_cast<PyObject**>(holey + key);
        return stride == 2 * sizeof(PyObject*) ? run_over_holes<2>(entry, size, visit)
                                               : run_over_holes<3>(entry, size, visit);
    }

    // Prefetches the keys and values of `count` entries, starting at `start`.
    OPTREE_INLINE void prefetch(std::uint32_t start, std::uint32_t count) const noexcept {
        if (first == nullptr) return;
        DictEntries some = *this;
        some.first += start * stride;
        some.for_each(count, [](std::uint32_t, PyObject* its_key, PyObject* value) {
            compat::prefetch(its_key);
            compat::prefetch(value);
            return true;
        });
    }

  private:
    template <std::size_t kWords, class Visit>
    OPTREE_NOINLINE static bool run_over_holes(PyObject** entry, std::uint32_t size, Visit visit) {
        for (std::uint32_t i = 0; i < size; ++i, entry += kWords) {
            while (entry[1] == nullptr) entry += kWords;
            if (OPTREE_UNLIKELY(!visit(i, entry[0], entry[1]))) return false;
        }
        return true;
    }

    template <std::size_t kWords, class Visit>
    OPTREE_INLINE bool run(std::uint32_t size, Visit&& visit) const {
        auto* entry = reinterpret_cast<PyObject**>(first + key);
        for (std::uint32_t i = 0; i < size; ++i, entry += kWords) {
            if (OPTREE_UNLIKELY(!visit(i, entry[0], entry[1]))) return false;
        }
        return true;
    }
};

#if PY_VERSION_HEX < 0x03100000 && !defined(PYPY_VERSION)

namespace dict_internals {

#if PY_VERSION_HEX < 0x030B0000
// The first fields of PyDictKeysObject in CPython 3.9 and 3.10.
struct Keys {
    Py_ssize_t refcnt;
    Py_ssize_t size;
    void* lookup;
    Py_ssize_t usable;
    Py_ssize_t nentries;
};
inline Py_ssize_t size_of_table(const Keys& keys) noexcept { return keys.size; }
#else
// PyDictKeysObject in CPython 3.11 to 3.15.
struct Keys {
    Py_ssize_t refcnt;
    std::uint8_t log2_size;
    std::uint8_t log2_index_bytes;
    std::uint8_t kind;
    std::uint8_t mutex;  // in free-threaded builds, for tables shared by several dicts
    std::uint32_t version;
    Py_ssize_t usable;
    Py_ssize_t nentries;
    char indices[1];
};
inline constexpr std::uint8_t kGeneral = 0;  // entries (hash, key, value)
inline constexpr std::uint8_t kUnicode = 1;  // entries (key, value)
inline Py_ssize_t size_of_table(const Keys& keys) noexcept {
    return Py_ssize_t{1} << keys.log2_size;
}
#endif

}  // namespace dict_internals
#endif

#if PY_VERSION_HEX < 0x03100000 && !defined(PYPY_VERSION) && !defined(Py_GIL_DISABLED)
#define OPTREE_DICT_KEYS 1

// Whether nothing was ever removed from the table of a dict: it has no holes, and its last entry
// was not popped.
OPTREE_INLINE bool only_grew(PyObject* dict) noexcept {
    const auto* object = reinterpret_cast<PyDictObject*>(dict);
    const auto& keys = *reinterpret_cast<const dict_internals::Keys*>(object->ma_keys);
    const auto room = static_cast<std::size_t>(keys.usable + keys.nentries);
    const auto twice = 2 * static_cast<std::size_t>(dict_internals::size_of_table(keys));
    // room == twice / 3, without a division
    return object->ma_values == nullptr && keys.nentries == object->ma_used && twice - 3 * room < 3;
}
#else
#define OPTREE_DICT_KEYS 0
#endif

#if OPTREE_DICT_ENTRIES

namespace dict_internals {

// Whether the collector tracks a dict from its creation, or only once it holds an object that may
// be in a cycle.
inline constexpr bool kDictsAreBornTracked = PY_VERSION_HEX >= 0x030E0000;

OPTREE_INLINE void* allocate(std::size_t bytes) noexcept {
#if PY_VERSION_HEX < 0x030D0000
    return PyObject_Malloc(bytes);
#else
    return PyMem_Malloc(bytes);
#endif
}

}  // namespace dict_internals

OPTREE_INLINE DictEntries dict_entries(PyObject* dict) noexcept {
    const auto* object = reinterpret_cast<PyDictObject*>(dict);
    auto* keys = reinterpret_cast<dict_internals::Keys*>(object->ma_keys);
    if (object->ma_values != nullptr) return {};
    char* first = keys->indices + (std::size_t{1} << keys->log2_index_bytes);
    char* holey = nullptr;
    if (OPTREE_UNLIKELY(keys->nentries != object->ma_used)) std::swap(first, holey);
    if (OPTREE_LIKELY(keys->kind == dict_internals::kUnicode)) {
        return {first, 2 * sizeof(PyObject*), 0, holey};
    }
    if (keys->kind == dict_internals::kGeneral) {
        return {first, 3 * sizeof(PyObject*), sizeof(PyObject*), holey};
    }
    return {};
}

// The same for the common case: a dict without holes whose keys are all str. False for other dicts.
class TextEntries {
  public:
    OPTREE_INLINE explicit TextEntries(PyObject* dict) noexcept {
        const auto* object = reinterpret_cast<PyDictObject*>(dict);
        auto* keys = reinterpret_cast<dict_internals::Keys*>(object->ma_keys);
        const bool plain = object->ma_values == nullptr && keys->nentries == object->ma_used &&
                           keys->kind == dict_internals::kUnicode;
        if (OPTREE_LIKELY(plain)) {
            char* first = keys->indices + (std::size_t{1} << keys->log2_index_bytes);
            first_ = reinterpret_cast<PyObject**>(first);
        }
    }
    explicit operator bool() const noexcept { return first_ != nullptr; }
    PyObject* first_key() const noexcept { return first_[0]; }
    PyObject* value(std::size_t i) const noexcept { return first_[2 * i + 1]; }
    template <class Visit>
    OPTREE_INLINE bool for_each(std::uint32_t size, Visit&& visit) const {
        PyObject** entry = first_;
        for (std::uint32_t i = 0; i < size; ++i, entry += 2) {
            if (OPTREE_UNLIKELY(!visit(i, entry[0], entry[1]))) return false;
        }
        return true;
    }

  private:
    PyObject** first_ = nullptr;
};

namespace dict_internals {

// Most dicts have a table of this size: up to five keys, all str. Copying a constant length needs
// no function call.
inline constexpr std::size_t kSmallHead = offsetof(Keys, indices) + 8;
inline constexpr std::size_t kSmallTable = kSmallHead + 5 * 2 * sizeof(PyObject*);
OPTREE_INLINE bool is_small(const Keys& keys) noexcept {
    return keys.log2_size == 3 && keys.kind == kUnicode;
}

// The offset of the entries in a table, and the number of bytes up to their end.
struct Extent {
    std::size_t head, bytes;
};
inline Extent extent_of(const Keys& keys) noexcept {
    const std::size_t head = offsetof(Keys, indices) + (std::size_t{1} << keys.log2_index_bytes);
    const auto count = static_cast<std::size_t>(keys.usable + keys.nentries);
    return {head, head + count * (keys.kind == kUnicode ? 2 : 3) * sizeof(PyObject*)};
}

// Fills an empty dict, not visible to other code yet, with the `size` keys of `prototype`.
// `prototype` is a dict that only ever grew and whose entries can be read. `value(i)` returns a new
// reference for each entry. Returns false without calling `value` if memory runs out. Sets
// `in_cycles` if a value may be in a cycle.
template <class Value>
OPTREE_INLINE bool fill_like(PyObject* dict, PyObject* prototype, std::uint32_t size, Value&& value,
                             bool& in_cycles) noexcept {
    auto* source = reinterpret_cast<Keys*>(reinterpret_cast<PyDictObject*>(prototype)->ma_keys);
    char* keys;
    // Keys are read from the source: loads from the copy would stall, since it was just written.
    const auto fill = [&](std::uint32_t i, PyObject* key, PyObject*& its_value) {
        Py_INCREF(key);
        const auto place = reinterpret_cast<char*>(&its_value) - reinterpret_cast<char*>(source);
        PyObject* made = value(i);
        *reinterpret_cast<PyObject**>(keys + place) = made;
        in_cycles = in_cycles || PyType_IS_GC(Py_TYPE(made));
        return true;
    };
    if (OPTREE_LIKELY(is_small(*source))) {
        keys = static_cast<char*>(allocate(kSmallTable));
        if (OPTREE_UNLIKELY(keys == nullptr)) return false;
        std::memcpy(keys, source, kSmallTable);
        char* first = reinterpret_cast<char*>(source) + kSmallHead;
        DictEntries{first, 2 * sizeof(PyObject*), 0}.for_each(size, fill);
    } else {
        const std::size_t bytes = extent_of(*source).bytes;
        keys = static_cast<char*>(allocate(bytes));
        if (OPTREE_UNLIKELY(keys == nullptr)) return false;
        std::memcpy(keys, source, bytes);
        dict_entries(prototype).for_each(size, fill);
    }
    auto* object = reinterpret_cast<PyDictObject*>(dict);
#if PY_VERSION_HEX < 0x030C0000  // immortal in later versions
    --reinterpret_cast<Keys*>(object->ma_keys)->refcnt;
#endif
    object->ma_keys = reinterpret_cast<PyDictKeysObject*>(keys);
    object->ma_used = static_cast<Py_ssize_t>(size);
    return true;
}

}  // namespace dict_internals

// A new dict with the `size` keys of `prototype` and values as in `fill_like`. Returns null with
// MemoryError set, without calling `value`, if memory runs out.
//
// Calling PyDict_Copy and overwriting the values takes a third longer (benchmarks/optree, unflatten
// of the nested transformer state).
template <class Value>
OPTREE_INLINE PyObject* dict_like(PyObject* prototype, std::uint32_t size, Value&& value) noexcept {
    PyObject* dict = PyDict_New();
    if (OPTREE_UNLIKELY(dict == nullptr)) return nullptr;
    bool in_cycles = false;
    if (OPTREE_UNLIKELY(!dict_internals::fill_like(dict, prototype, size, value, in_cycles))) {
        Py_DECREF(dict);
        return PyErr_NoMemory();
    }
    if (!dict_internals::kDictsAreBornTracked && in_cycles) PyObject_GC_Track(dict);
    return dict;
}

// Prefetches the memory that a scan of the dict reads first.
OPTREE_INLINE void prefetch_entries(PyObject* dict) noexcept {
    const auto* keys =
        reinterpret_cast<const char*>(reinterpret_cast<PyDictObject*>(dict)->ma_keys);
    compat::prefetch(keys);
    compat::prefetch(keys + 64);
}

#else

inline DictEntries dict_entries(PyObject*) noexcept { return {}; }
struct TextEntries {
    explicit TextEntries(PyObject*) noexcept {}
    explicit operator bool() const noexcept { return false; }
    PyObject* first_key() const noexcept { return nullptr; }
    PyObject* value(std::size_t) const noexcept { return nullptr; }
    template <class Visit>
    bool for_each(std::uint32_t, Visit&&) const {
        return false;
    }
};
template <class Value>
PyObject* dict_like(PyObject*, std::uint32_t, Value&&) noexcept {
    return nullptr;
}
inline void prefetch_entries(PyObject*) noexcept {}

#endif

namespace compat {

// A dict with room for `size` items. Newer versions of CPython do not export the call that reserves
// room; there the dict grows as it is filled.
inline PyObject* new_dict([[maybe_unused]] Py_ssize_t size) noexcept {
#if PY_VERSION_HEX < 0x030D0000 && !defined(PYPY_VERSION)
    if (size > 5) return _PyDict_NewPresized(size);
#endif
    return PyDict_New();
}

}  // namespace compat
}  // namespace optree
