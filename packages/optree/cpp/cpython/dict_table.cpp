// SPDX-License-Identifier: Apache-2.0
#include "cpython/dict_table.h"

#include "cpython/trials.h"

namespace optree {
#if OPTREE_DICT_ENTRIES
namespace {

bool is_tracked_as_new(PyObject* dict) {
    return (PyObject_GC_IsTracked(dict) != 0) == dict_internals::kDictsAreBornTracked;
}

// Whether the entries of a dict match those of PyDict_Next, hashes included.
bool agrees(PyObject* dict, std::size_t size, bool holes = false) {
    const DictEntries entries = dict_entries(dict);
    if (holes ? entries.holey == nullptr : !entries) return false;
    Py_ssize_t pos = 0;
    PyObject* key = nullptr;
    PyObject* value = nullptr;
    const auto next = [&](std::uint32_t, PyObject*& its_key, PyObject* its_value) {
        return PyDict_Next(dict, &pos, &key, &value) && its_key == key && its_value == value &&
               entries.hash(its_key) == PyObject_Hash(key);
    };
    const auto count = static_cast<std::uint32_t>(size);
    const bool same =
        holes ? entries.for_each_but_holes(count, next) : entries.for_each(count, next);
    return same && !PyDict_Next(dict, &pos, &key, &value);
}

// Whether `dict_like` creates a dict that equals its prototype and can grow and shrink.
bool makes_alike(PyObject* dict, std::size_t size) {
    const Owned values = must(PyDict_Values(dict));
    const auto value = [&](std::uint32_t i) {
        return compat::new_ref(PyList_GET_ITEM(values.get(), i));
    };
    const Owned made = must(dict_like(dict, static_cast<std::uint32_t>(size), value));
    if (!agrees(made.get(), size) || !is_tracked_as_new(made.get()) ||
        PyObject_RichCompareBool(made.get(), dict, Py_EQ) != 1) {
        return false;
    }
    for (int i = 0; i < 10; ++i) {
        const Owned key = must(PyLong_FromLong(i));
        must_do(PyDict_SetItem(made.get(), key.get(), Py_None));
    }
    Py_ssize_t pos = 0;
    PyObject* key = nullptr;
    while (PyDict_Next(dict, &pos, &key, nullptr)) must_do(PyDict_DelItem(made.get(), key));
    return PyDict_GET_SIZE(made.get()) == 10;
}

// Whether the entries can be read after the first and the last one are deleted.
bool takes_holes(PyObject* dict, std::size_t size) {
    const Owned keys = must(PyDict_Keys(dict));
    const Py_ssize_t last = PyList_GET_SIZE(keys.get()) - 1;
    if (last < 2) return true;
    must_do(PyDict_DelItem(dict, PyList_GET_ITEM(keys.get(), 0)));
    must_do(PyDict_DelItem(dict, PyList_GET_ITEM(keys.get(), last)));
    return agrees(dict, size - 2, true);
}

// Whether an empty dict is in the state that `dict_like` expects.
bool starts_empty() {
    const Owned dict = must(PyDict_New());
    const auto* object = reinterpret_cast<PyDictObject*>(dict.get());
    const auto* keys = reinterpret_cast<const dict_internals::Keys*>(object->ma_keys);
    return object->ma_values == nullptr && keys->nentries == 0 && keys->usable == 0 &&
           is_tracked_as_new(dict.get());
}

// Whether the table of a small dict has the extent that the copy assumes.
bool is_small_as_known(PyObject* dict) {
    using namespace dict_internals;
    const auto& keys =
        *reinterpret_cast<const Keys*>(reinterpret_cast<const PyDictObject*>(dict)->ma_keys);
    const Extent extent = extent_of(keys);
    return !is_small(keys) || (extent.head == kSmallHead && extent.bytes == kSmallTable);
}

}  // namespace
#endif

bool try_dict_table() {
#if OPTREE_DICT_ENTRIES
    if (!starts_empty()) return false;
    // A small dict with str keys, one that has grown, and one with other keys.
    for (const int size : {1, 40}) {
        for (const bool text : {true, false}) {
            const Owned dict = must(PyDict_New());
            for (int i = 0; i < size; ++i) {
                const Owned number = must(PyLong_FromLong(1000 + i));
                const Owned key =
                    must(text ? PyObject_Str(number.get()) : compat::new_ref(number.get()));
                must_do(PyDict_SetItem(dict.get(), key.get(), number.get()));
            }
            const Owned copy = must(PyDict_Copy(dict.get()));
            const auto count = static_cast<std::size_t>(size);
            if (!is_small_as_known(dict.get()) || !agrees(dict.get(), count) ||
                !agrees(copy.get(), count) || !makes_alike(dict.get(), count)) {
                return false;
            }
            if (!takes_holes(dict.get(), count)) return false;
        }
    }
    return true;
#else
    return false;
#endif
}

}  // namespace optree
