// SPDX-License-Identifier: Apache-2.0
#include "nodes/dict_entries.h"

namespace optree {
#if OPTREE_DICT_ENTRIES
namespace {

// Whether the entries of a dict are what PyDict_Next says they are.
bool agrees(PyObject* dict, std::size_t size) {
    const DictEntries entries = dict_entries(dict);
    if (!entries) return false;
    Py_ssize_t pos = 0;
    PyObject* key = nullptr;
    PyObject* value = nullptr;
    const bool same = entries.for_each(static_cast<std::uint32_t>(size),
                                       [&](std::uint32_t, PyObject* its_key, PyObject* its_value) {
                                           return PyDict_Next(dict, &pos, &key, &value) &&
                                                  its_key == key && its_value == value;
                                       });
    return same && !PyDict_Next(dict, &pos, &key, &value);
}

}  // namespace
#endif

bool dict_entries_are_readable() {
#if OPTREE_DICT_ENTRIES
    // A small dict of str keys, one that has grown, and one of other keys.
    for (const int size : {1, 40}) {
        for (const bool text : {true, false}) {
            const Ref dict = checked(PyDict_New());
            for (int i = 0; i < size; ++i) {
                const Ref number = checked(PyLong_FromLong(1000 + i));
                const Ref key =
                    text ? checked(PyObject_Str(number.get())) : Ref::borrow(number.get());
                check_status(PyDict_SetItem(dict.get(), key.get(), number.get()));
            }
            const Ref copy = checked(PyDict_Copy(dict.get()));
            if (!agrees(dict.get(), static_cast<std::size_t>(size)) ||
                !agrees(copy.get(), static_cast<std::size_t>(size))) {
                return false;
            }
        }
    }
    return true;
#else
    return false;
#endif
}

}  // namespace optree
