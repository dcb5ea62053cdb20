// SPDX-License-Identifier: Apache-2.0
#include "cpython/odict_list.h"

namespace optree {
#if OPTREE_ODICT_LIST
namespace {

Owned trial_dict() {
    Owned trial = must(PyODict_New());
    for (const char* name : {"a", "b", "c"}) {
        const Owned key = must(PyUnicode_InternFromString(name));
        must_do(PyODict_SetItem(trial.get(), key.get(), Py_None));
    }
    return trial;
}

#if OPTREE_ODICT_FILL
// Whether an OrderedDict made by `odict_like` behaves like an ordinary one with the same items.
bool makes_alike(std::uint32_t size) {
    const Owned prototype = must(PyDict_New());
    const Owned expected = must(PyODict_New());
    const Owned values = must(PyList_New(0));
    for (std::uint32_t i = 0; i < size; ++i) {
        const Owned key = must(PyUnicode_FromFormat("key %u", static_cast<unsigned>(i)));
        const Owned value = must(PyLong_FromLong(1000 + static_cast<long>(i)));
        must_do(PyDict_SetItem(prototype.get(), key.get(), Py_None));
        must_do(PyODict_SetItem(expected.get(), key.get(), value.get()));
        must_do(PyList_Append(values.get(), value.get()));
    }
    const Owned made = must(odict_like(prototype.get(), size, [&](std::uint32_t i) {
        return compat::new_ref(PyList_GET_ITEM(values.get(), static_cast<Py_ssize_t>(i)));
    }));
    const auto agree = [&] {
        const Owned mine = must(PySequence_List(made.get()));
        const Owned its = must(PySequence_List(expected.get()));
        return only_grew(made.get()) == only_grew(expected.get()) &&
               PyObject_RichCompareBool(mine.get(), its.get(), Py_EQ) == 1 &&
               PyObject_RichCompareBool(made.get(), expected.get(), Py_EQ) == 1;
    };
    if (!only_grew(made.get()) || !agree()) return false;
    for (PyObject* dict : {made.get(), expected.get()}) {
        must(PyObject_CallMethod(dict, "move_to_end", "s", "key 0"));
        must(PyObject_CallMethod(dict, "update", "{s:i,s:i}", "new", 1, "key 0", 2));
        must(PyObject_CallMethod(dict, "move_to_end", "si", "new", 0));
    }
    if (!agree()) return false;
    for (PyObject* dict : {made.get(), expected.get()}) {
        must(PyObject_CallMethod(dict, "popitem", "i", 0));
        must_do(PyObject_DelItemString(dict, "key 0"));
    }
    return agree();
}
#else
bool makes_alike(std::uint32_t) { return true; }
#endif

}  // namespace

// Whether the list follows move_to_end, and whether changes that bypass it are detected.
bool try_odict_list() {
    if (PyODict_Type.tp_basicsize != static_cast<Py_ssize_t>(sizeof(odict_internals::Head))) {
        return false;
    }
    const Owned trial = trial_dict();
    if (!only_grew(trial.get())) return false;
    must(PyObject_CallMethod(trial.get(), "move_to_end", "s", "a"));
    // Follow only pointers that the keys of the dict confirm.
    const odict_internals::Node* node = odict_internals::first_of(trial.get());
    for (const char* name : {"b", "c", "a"}) {
        const Owned key = must(PyUnicode_InternFromString(name));
        if (node == nullptr || node->key != key.get()) return false;
        node = node->next;
    }
    if (node != nullptr || !only_grew(trial.get())) return false;
    must_do(PyDict_DelItemString(trial.get(), "b"));
    const Owned popped = trial_dict();
    must(PyObject_CallMethod(reinterpret_cast<PyObject*>(&PyDict_Type), "popitem", "O",
                             popped.get()));
    if (only_grew(trial.get()) || only_grew(popped.get())) return false;
    // Only tried if the layout of a dict's table was confirmed.
    return !trials.dict_table.held() || (makes_alike(3) && makes_alike(40));
}

#else
bool try_odict_list() { return false; }
#endif

}  // namespace optree
