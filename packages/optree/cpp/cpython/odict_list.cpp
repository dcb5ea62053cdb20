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

}  // namespace

// Whether the list follows move_to_end, and what goes around it is noticed.
bool try_odict_list() {
    if (PyODict_Type.tp_basicsize != static_cast<Py_ssize_t>(sizeof(odict_internals::Head))) {
        return false;
    }
    const Owned trial = trial_dict();
    if (!only_grew(trial.get())) return false;
    must(PyObject_CallMethod(trial.get(), "move_to_end", "s", "a"));
    // Only follow pointers that the dict's own keys vouch for.
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
    return !only_grew(trial.get()) && !only_grew(popped.get());
}

#else
bool try_odict_list() { return false; }
#endif

}  // namespace optree
